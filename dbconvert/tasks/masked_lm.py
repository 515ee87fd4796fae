"""Masked diffusion language models (MD4): tokens are hidden one by one as t grows, and a block names the hidden ones.

x is the partly hidden sequence, and z says which tokens are hidden, [N, S] bool. One learnt vector a block stands in
the place of a hidden token's embedding: no table needs a row for it, and the network is never shown the token's
number. With the weight -alpha'(t) / (1 - alpha(t)) the mean loss over even t in (0, 1] is the negative evidence bound
in nats a token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.data.examples import IGNORED
from dbconvert.data.sequences import DOCUMENTS
from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.errors import DBConvertError
from dbconvert.graph.seeing import ask_both_ways
from dbconvert.graph.sight import Sight
from dbconvert.graph.two_streams import spread
from dbconvert.plan import Context, Rule, Table, Target
from dbconvert.recipe import Z
from dbconvert.tasks.base import Change, Corruption, Embed, Headline, Inputs, Passage, along, conditioning
from dbconvert.tasks.discrete import above_mean, modulated, register_readouts
from dbconvert.tasks.language import LanguageTask, one_document

FILLER = 0
"""The number that stands for a hidden token; only its place is used."""


class MaskedLM(LanguageTask):
    """Networks that look tokens up in a table and end in a linear head over the same tokens at every position, where
    every position sees every other, or can be made to.

    Parameters it adds, for each block: `mask` [1, d], the embedding of a hidden token, and a linear to the shift and
    scale of the features before the head. Nothing passes between blocks.
    """

    name: ClassVar[str] = "masked_lm"
    contexts: ClassVar[tuple[Context, ...]] = ("raw", "features", "estimate")
    zs: ClassVar[tuple[Z, ...]] = ("noised", "on-policy", "mixed")
    rule: ClassVar[Rule] = "mask"
    tables: ClassVar[tuple[Table, ...]] = ("none",)
    bounded: ClassVar[bool] = True
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline("bits a character", "bits_per_character", "bits_per_character"),
    )
    denoiser: ClassVar[bool] = True
    aside: ClassVar[bool] = True

    # -- deciding -----------------------------------------------------------------------------------------

    @staticmethod
    def refusal(anatomy: Anatomy) -> str | None:
        return LanguageTask.obstacle(anatomy)

    @staticmethod
    def on_request(anatomy: Anatomy) -> bool:
        """Networks that hide the future are taken for what they are unless told otherwise."""
        return anatomy.causal is not False

    @staticmethod
    def decide(anatomy: Anatomy) -> Target:
        assert anatomy.embedding is not None
        return Target(anatomy.embedding.rows, anatomy.embedding.width, "mask", table="none")

    @staticmethod
    def learn(model: nn.Module, anatomy: Anatomy, target: Target) -> Target:
        sides, apart = ask_both_ways(model, anatomy)
        return replace(target, sides=sides, apart=apart)

    # -- parameters ---------------------------------------------------------------------------------------

    def register(self, model: nn.Module, *, blocks: int, width: int, seed: int) -> None:
        assert self.anatomy.head is not None
        register_readouts(model, blocks, width, self.anatomy.head.features)
        generator = torch.Generator().manual_seed(seed)
        masks = {str(b): nn.Embedding(1, self.target.width) for b in range(blocks)}
        for mask in masks.values():
            if mask.weight.device.type != "meta":
                mask.weight.data.copy_(torch.randn(mask.weight.shape, generator=generator))
        conditioning(model).add_module("mask", nn.ModuleDict(masks))

    def block_of(self, key: str) -> int | None:
        part, _, rest = key.partition(".")
        return int(rest.split(".")[0]) if part in ("readout", "mask") else None

    # -- a forward pass -----------------------------------------------------------------------------------

    def c_noise(self, level: Tensor, scaling: Preconditioning) -> Tensor:
        return self.masking.c_noise(level)

    def draw(
        self, inputs: Inputs, *, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """A number in [0, 1) for every position, which is hidden once 1 - alpha(t) exceeds it."""
        return torch.rand(self.tokens(inputs).shape, generator=generator, device=device)

    def corrupt(self, model: nn.Module, labels: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        return (eps < along(self.masking.masked(level).to(eps.dtype), eps)) & (labels != IGNORED)

    def passage(self, model: nn.Module, block: int, inputs: Inputs, corruption: Corruption) -> Passage:
        inputs = dict(inputs)
        together = self.together(inputs.pop(DOCUMENTS, None))
        hidden = corruption.z
        inputs[self.embedding.argument] = self.tokens(inputs).masked_fill(hidden, FILLER)
        opened = self.anatomy.causal is not False
        sight = Sight(self.sides, opened=opened, together=together)
        changed = opened or together is not None
        return Passage(
            inputs,
            corruption.condition,
            embed=self.hiding(model, block, hidden),
            beside=sight.beside if changed else None,
            attention=sight.attention if changed else None,
            exit=modulated(model, block, corruption.condition),
        )

    def together(self, documents: Tensor | None) -> Tensor | None:
        """[N, S, S], which positions may see each other: those of one document; None where all may.

        Raises:
            DBConvertError: they would have to be kept apart, and no mask of this network does.
        """
        if documents is None:
            return None
        if not self.target.apart:
            raise DBConvertError(
                "this network's attention takes no mask that keeps documents or padding apart",
                hint="leave data.documents=joined and data.pack=true",
            )
        return one_document(documents)

    def hiding(self, model: nn.Module, block: int, hidden: Tensor) -> Embed:
        """Puts the learnt vector, at the scale of the network's own embeddings, in the place of hidden tokens'."""
        rows = self.embedding.rows
        vector = conditioning(model).get_parameter(f"mask.{block}.weight")

        def embed(out: Tensor, look_up: Change) -> Tensor:
            return torch.where(hidden[..., None], (vector * spread(look_up, rows, out.device)).to(out.dtype), out)

        return embed

    def noisier(self, z: Tensor, level: Tensor, higher: Tensor, draw: Tensor, labels: Tensor) -> Tensor:
        """More is hidden: each visible token with the probability that it has been revealed since."""
        now, before = (along(self.masking.masked(t).to(draw.dtype), draw) for t in (level, higher))
        return z | ((draw < (before - now) / (1 - now).clamp(min=1e-12)) & (labels != IGNORED))

    def handover(self, intervals: Intervals, block: int) -> float:
        """A block shows tokens all through its interval, in as many evaluations as one likes."""
        return intervals.owned(block)[0]

    def embeddings(self, model: nn.Module) -> Tensor:
        """The network's own, normalised, [K, d]."""
        rows = model.get_submodule(self.embedding.module).get_parameter("weight")
        return F.normalize(rows.float(), dim=-1)

    def expected(self, model: nn.Module, scores: Tensor) -> Tensor:
        return scores.float().softmax(-1) @ self.embeddings(model)

    def told(self, model: nn.Module, expected: Tensor, z: Tensor) -> Tensor:
        """Of hidden positions only."""
        return above_mean(expected, self.embeddings(model)) * z[..., None]

    # -- figures ------------------------------------------------------------------------------------------

    def weighed(self, losses: Tensor, z: Tensor, level: Tensor) -> Tensor:
        """Of hidden positions only, times -alpha' / (1 - alpha)."""
        return losses * z * along(self.masking.weight(level).to(losses.dtype), losses)
