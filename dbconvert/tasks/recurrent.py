"""Recurrent-depth language models (Huginn): the state of the looped core is the noisy embedding of the token to come.

One update is one ordinary causal pass: prelude, the core once, coda. y at position i is the embedding of token i + 1,
z = y + sigma eps, and c_in z enters the core as its state. With F what leaves the core, D = c_skip z + c_out F goes on
to the coda and the head, which name token i + 1. Nothing leaks: the state at a position before i is of a token that
the prefix of i shows anyway. A prediction runs the core again and again, with Euler steps between.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.data.sequences import DOCUMENTS
from dbconvert.errors import DBConvertError
from dbconvert.graph.loop_trial import ask_loop
from dbconvert.graph.looped import LoopPass
from dbconvert.graph.two_streams import positions_axis
from dbconvert.plan import Target
from dbconvert.recipe import Z
from dbconvert.rounds import Loop
from dbconvert.tasks.base import Corruption, Inputs, Passage, along
from dbconvert.tasks.discrete import Denoising, modulated, register_readouts, register_table
from dbconvert.tasks.next_token import NextToken, one_later


class Recurrent(NextToken):
    """Causal language models whose layers run again and again, as one block that serves all levels.

    The state enters at the scale that the network's own state has after one round. Where the network takes up nothing
    between two rounds, so that its state is what the prelude made, the noisy one is added to that.

    Parameters it adds: a linear to the shift and scale of the features before the head; and, where the target table is
    `fresh`, `target.weight` [K, d].
    """

    name: ClassVar[str] = "recurrent"
    lead: ClassVar[int] = 1
    looped: ClassVar[bool] = True
    moves: ClassVar[tuple[int, ...]] = (4, 8, 16)
    zs: ClassVar[tuple[Z, ...]] = ("noised", "on-policy", "mixed")

    # -- deciding -----------------------------------------------------------------------------------------

    @staticmethod
    def refusal(anatomy: Anatomy) -> str | None:
        obstacle, embedding = NextToken.refusal(anatomy), anatomy.embedding
        if obstacle is None and embedding is not None and embedding.width != anatomy.width:
            return f"the state is {anatomy.width} wide, and embeddings are {embedding.width} wide"
        return obstacle

    @staticmethod
    def decide(anatomy: Anatomy) -> Target:
        assert anatomy.embedding is not None
        return Target(anatomy.embedding.rows, anatomy.embedding.width, "state", table="own")

    @staticmethod
    def learn(model: nn.Module, anatomy: Anatomy, target: Target) -> Target:
        return replace(target, loop=ask_loop(model, anatomy))

    @property
    def loop(self) -> Loop:
        assert self.target.loop is not None
        return self.target.loop

    @property
    def evaluations(self) -> int | None:
        """As many as the network ran its core."""
        return self.anatomy.calls

    # -- parameters ---------------------------------------------------------------------------------------

    def register(self, model: nn.Module, *, blocks: int, width: int, seed: int) -> None:
        assert self.anatomy.head is not None
        if self.target.table == "fresh":
            register_table(model, self.target, seed)
        register_readouts(model, blocks, width, self.anatomy.head.features)

    def block_of(self, key: str) -> int | None:
        part, _, rest = key.partition(".")
        return int(rest.split(".")[0]) if part == "readout" else None

    # -- a forward pass -----------------------------------------------------------------------------------

    def corrupt(self, model: nn.Module, labels: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        """z at a position is of the label after it; at the last one, whose target is not there, of token 0."""
        after = torch.cat([labels[:, 1:], torch.zeros_like(labels[:, :1])], 1)
        return super().corrupt(model, after, level, eps)

    def passage(self, model: nn.Module, block: int, inputs: Inputs, corruption: Corruption) -> Passage:
        self.refuse_documents(inputs)
        z = corruption.z
        state = self.laid_out(along(corruption.scaling.c_in(corruption.sigma) * self.loop.scale, z) * z)
        denoised = Denoising.at(corruption).of(z)
        return Passage(
            inputs,
            corruption.condition,
            entry=None if self.loop.places else lambda stream: stream + state.to(stream.dtype),
            leave=lambda stream: self.laid_out(denoised(self.laid_out(stream))),
            exit=modulated(model, block, corruption.condition),
            loop=LoopPass(rounds=1, state=state if self.loop.places else None),
        )

    def plain_passage(self, inputs: Inputs) -> Passage:
        self.refuse_documents(inputs)
        return Passage(inputs)

    def laid_out(self, value: Tensor) -> Tensor:
        """[N, S, d] as the stream lies, and back."""
        return value if positions_axis(self.anatomy.axes) == 1 else value.transpose(0, 1)

    @staticmethod
    def refuse_documents(inputs: Inputs) -> None:
        if DOCUMENTS in inputs:
            raise DBConvertError(
                "documents cannot be kept apart: layers outside of the core take no other mask",
                hint="leave data.documents=joined",
            )

    # -- figures ------------------------------------------------------------------------------------------

    def placed(self, output: Tensor) -> Tensor:
        return one_later(output)
