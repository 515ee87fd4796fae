"""What tasks share whose target is the embedding of the token to come: its table, and which tokens count."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.plan import Rule, Table
from dbconvert.tasks.base import Headline, Inputs, conditioning
from dbconvert.tasks.language import LanguageTask


class NextToken(LanguageTask):
    """Networks that predict the next token: y is a row of their own table, or of a fresh one, normalised."""

    rule: ClassVar[Rule] = "auto"
    tables: ClassVar[tuple[Table, ...]] = ("own", "fresh")
    ahead: ClassVar[int] = 1
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline("loss of block 0 from z = 0", "loss_first", "loss"),
        Headline("the same from noise", "loss_first_draw"),
    )

    @staticmethod
    def refusal(anatomy: Anatomy) -> str | None:
        embedding, head = anatomy.embedding, anatomy.head
        obstacle = LanguageTask.obstacle(anatomy)
        if obstacle is not None or embedding is None or head is None:
            return obstacle
        if head.features != embedding.width:
            return f"the head reads {head.features} features, and embeddings are {embedding.width} wide"
        return "positions see later ones" if anatomy.causal is False else None

    def rows(self, model: nn.Module) -> Tensor:
        """The table before it is normalised, [K, d]."""
        if self.target.table == "fresh":
            return conditioning(model).get_parameter("target.weight")
        return model.get_submodule(self.embedding.module).get_parameter("weight")

    def table(self, model: nn.Module) -> Tensor:
        return F.normalize(self.rows(model).float(), dim=-1)

    def target_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return *self.tokens(inputs).shape, self.target.width

    def clean(self, model: nn.Module, labels: Tensor) -> Tensor:
        found, rows = labels.clamp(min=0), self.rows(model)
        if labels.numel() < len(rows):
            return F.normalize(F.embedding(found, rows).float(), dim=-1)
        return F.embedding(found, self.table(model))

    def denoised(self, model: nn.Module, output: Tensor) -> Tensor:
        return output.float().softmax(-1) @ self.table(model)

    def plain(self, output: Tensor) -> Tensor:
        """Position i of the ordinary network predicts token i + 1; nothing predicts the first, which does not count."""
        return one_later(output)

    def counted(self, labels: Tensor) -> Tensor:
        """Padding does not count, nor does the first token, which an ordinary network cannot predict."""
        counted = super().counted(labels)
        counted[:, 0] = 0
        return counted


def one_later(output: Tensor) -> Tensor:
    """What position i says of token i + 1, in the place of token i + 1; the first place holds nothing of worth."""
    return torch.cat([output[:, :1], output[:, :-1]], 1)
