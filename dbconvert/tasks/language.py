"""What tasks of text share: tokens in a table, a linear head over the same tokens at every position."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from dbconvert.anatomy import Anatomy, Embedding, Path, SideAxes
from dbconvert.data.examples import IGNORED
from dbconvert.tasks.base import Inputs, Task


class LanguageTask(Task):
    """Networks that look tokens up in a table and end in a linear head over the same tokens at every position."""

    text: ClassVar[bool] = True
    tried: ClassVar[bool] = True

    @staticmethod
    def obstacle(anatomy: Anatomy) -> str | None:
        """Why a network is none of these; None if it is."""
        embedding, head = anatomy.embedding, anatomy.head
        if embedding is None:
            return "no table of embeddings is looked up with an argument of the network"
        if head is None:
            return "the network has no language head: its output is not the result of one linear module"
        if head.pooled:
            return "the head reads one vector an example, not every position"
        if head.outputs != embedding.rows:
            several = f"{head.labels} times " if head.labels > 1 else ""
            return f"the head tells {several}{head.classes} tokens apart, the table has {embedding.rows}"
        if len(anatomy.stream_shape) != 3:
            return "the stream has other axes than examples, positions and channels"
        return None

    @property
    def embedding(self) -> Embedding:
        assert self.anatomy.embedding is not None
        return self.anatomy.embedding

    @property
    def sides(self) -> dict[Path, SideAxes]:
        """What the layers receive beside the stream, by argument."""
        return {side.argument: side for side in self.target.sides}

    def tokens(self, inputs: Inputs) -> Tensor:
        return inputs[self.embedding.argument]

    def stand_in(self, inputs: Inputs) -> Tensor:
        return self.tokens(inputs)

    def losses(self, output: Tensor, labels: Tensor) -> Tensor:
        flat = F.cross_entropy(output.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view(labels.shape)

    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.argmax(-1) == labels

    def probabilities(self, output: Tensor) -> Tensor:
        return output.float().softmax(-1)

    def counted(self, labels: Tensor) -> Tensor:
        """Padding does not count."""
        return (labels != IGNORED).float()


def one_document(documents: Tensor) -> Tensor:
    """Which positions belong to one document, [N, S, S] bool, from their numbers [N, S]."""
    return documents[:, :, None] == documents[:, None, :]
