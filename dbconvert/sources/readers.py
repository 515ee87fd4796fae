"""Trained Transformers models that read texts: with what they make of them, samples of other networks are judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dbconvert.errors import DBConvertError, UsageError
from dbconvert.sources.tokenizers import HUB_NAME, read_tokenizer
from dbconvert.sources.transformers_config import first_line
from dbconvert.sources.transformers_files import quiet


@dataclass(frozen=True)
class Reader:
    """A model with its own tokenizer, and the folder or hub id that it is from."""

    model: Any
    tokenizer: Any
    location: str

    @torch.no_grad()
    def nats(self, prompt: str, text: str) -> tuple[float, int]:
        """What a text costs after a prompt, and how many tokens of the reader's own it has.

        The two are turned into tokens apart from each other. Without a prompt the first token is not counted.

        Raises:
            DBConvertError: they are longer than the reader reads.
        """
        before, tokens = self.encode(prompt), self.encode(text)
        if not before:
            before, tokens = tokens[:1], tokens[1:]
        if not tokens:
            return 0.0, 0
        scores = self.run([*before, *tokens]).logits[0, len(before) - 1 : -1].float()
        losses = F.cross_entropy(scores, torch.tensor(tokens, device=scores.device), reduction="sum")
        return float(losses), len(tokens)

    @torch.no_grad()
    def feature(self, text: str) -> Tensor:
        """The last layer's features of the last token, [d] on the CPU."""
        hidden: Tensor = self.run(self.encode(text), output_hidden_states=True).hidden_states[-1]
        return hidden[0, -1].float().cpu()

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    def run(self, tokens: list[int], **more: Any) -> Any:
        most = getattr(self.model.config, "max_position_embeddings", None)
        if not tokens or (most and len(tokens) > most):
            raise DBConvertError(
                f"a text has {len(tokens)} tokens of {self.location}, which reads 1 to {most}",
                hint="lower eval.prompt or eval.tokens",
            )
        return self.model(input_ids=torch.tensor([tokens], device=self.model.device), **more)


def open_reader(location: str, *, scores: bool, device: torch.device) -> Reader:
    """A model from a folder or the hub. Code that a repository brings along is not run.

    Args:
        scores: with its language head.

    Raises:
        UsageError: there is no such folder.
        DBConvertError: it is no such model, or cannot be read.
    """
    import transformers

    folder = Path(location).expanduser()
    if not folder.is_dir() and (folder.exists() or not HUB_NAME.match(location)):
        raise UsageError(f"there is no model {location}", hint="give a Transformers folder or a hub id")
    where = str(folder) if folder.is_dir() else location
    kind = transformers.AutoModelForCausalLM if scores else transformers.AutoModel
    with quiet():
        try:
            model = kind.from_pretrained(where, trust_remote_code=False)
        except Exception as error:  # of many kinds, all meaning that there is none to be had
            raise DBConvertError(
                f"cannot read a {'causal language ' if scores else ''}model from {location}",
                why=first_line(error),
                hint="give a Transformers folder with config.json, weights and tokenizer, or a hub id",
            ) from None
    return Reader(model.eval().to(device), read_tokenizer(where), location)
