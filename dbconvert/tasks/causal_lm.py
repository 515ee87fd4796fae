"""Autoregressive language models: y is the embedding of the token to come, denoised after its clean prefix.

Training runs [clean ; noisy] through a block in one pass. Noisy position i, which has the position number i, sees
clean positions before i and itself, and its output is token i. Clean positions are conditioned by one learnt constant a
block, never by sigma, so that what a generator caches of them holds at every level.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy
from dbconvert.data.sequences import DOCUMENTS
from dbconvert.graph.halves import LastLayer
from dbconvert.graph.oracle import ask
from dbconvert.graph.prefix import Prefix
from dbconvert.graph.run import Filled
from dbconvert.graph.sight import Sight
from dbconvert.graph.two_streams import TwoStreams, positions_axis, spread
from dbconvert.plan import Context, Target
from dbconvert.recipe import Z
from dbconvert.tasks.base import Change, Corruption, Embed, Inputs, Passage, along, conditioning
from dbconvert.tasks.discrete import (
    Denoising,
    above_mean,
    denoise_before_head,
    modulated_denoised,
    register_readouts,
    register_table,
)
from dbconvert.tasks.language import one_document
from dbconvert.tasks.next_token import NextToken

STEADY = 2
"""New positions of an evaluation once the prompt is cached: the token before, in a block's first, and the noisy one."""


@dataclass
class Level:
    """What a block is told at one level, the same for every token that is written.

    Args:
        condition: of the noisy position, [N, width]. clean: of the others, [width].
        c_in: shaped to multiply z.
        read: what happens to D before the head.
        filled: modulations of layers, by the number of positions that run.
        scale: what embeddings are multiplied by, once it is known.
    """

    condition: Tensor
    clean: Tensor
    c_in: Tensor
    denoising: Denoising
    read: Change
    filled: dict[int, Filled] = field(default_factory=dict)
    scale: Tensor | None = None

    def conditions(self, new: int) -> Tensor:
        """Of `new` positions, the last one noisy: [N, new, width]."""
        clean = self.clean.expand(len(self.condition), new - 1, -1)
        return torch.cat([clean, self.condition[:, None]], 1)

    def entering(self, look_up: Change, rows: int, like: Tensor) -> Tensor:
        """c_in at the scale of the network's own embeddings."""
        if self.scale is None:
            self.scale = self.c_in * spread(look_up, rows, like.device)
        return self.scale


class CausalLM(NextToken):
    """Networks that look tokens up in a table and end in a linear head over the same tokens at every position.

    Parameters it adds: `clean` [width] a block, the conditioning of clean positions; for each block a linear to the
    shift and scale of the features before the head; and, where the target table is `fresh`, `target.weight` [K, d].
    """

    name: ClassVar[str] = "causal_lm"
    contexts: ClassVar[tuple[Context, ...]] = ("raw", "features", "estimate")
    zs: ClassVar[tuple[Z, ...]] = ("noised", "on-policy", "mixed")
    doubled: ClassVar[bool] = True

    # -- deciding -----------------------------------------------------------------------------------------

    @staticmethod
    def decide(anatomy: Anatomy) -> Target:
        assert anatomy.embedding is not None
        return Target(anatomy.embedding.rows, anatomy.embedding.width, "sequence", table="own")

    @staticmethod
    def learn(model: nn.Module, anatomy: Anatomy, target: Target) -> Target:
        sides, halves = ask(model, anatomy)
        return replace(target, sides=sides, halves=halves)

    # -- parameters ---------------------------------------------------------------------------------------

    def register(self, model: nn.Module, *, blocks: int, width: int, seed: int) -> None:
        if self.target.table == "fresh":
            register_table(model, self.target, seed)
        register_readouts(model, blocks, width, self.target.width)
        generator = torch.Generator().manual_seed(seed)
        clean = {str(b): nn.Parameter(0.5 * torch.randn(width, generator=generator)) for b in range(blocks)}
        conditioning(model).add_module("clean", nn.ParameterDict(clean))

    def block_of(self, key: str) -> int | None:
        part, _, rest = key.partition(".")
        return int(rest.split(".")[0]) if part in ("readout", "clean") else None

    # -- a forward pass -----------------------------------------------------------------------------------

    def passage(self, model: nn.Module, block: int, inputs: Inputs, corruption: Corruption) -> Passage:
        examples, length = self.tokens(inputs).shape
        inputs, together = apart(inputs)
        streams = TwoStreams(length, self.anatomy.axes, self.sides, together, self.kernel)
        condition = both_conditions(conditioning(model).get_submodule("clean")[str(block)], corruption.condition)  # type: ignore[index]
        streams.same = condition.shape[1] // 2
        return Passage(
            {name: torch.cat([v, v]) if len(v) == examples else v for name, v in inputs.items()},
            condition,
            same=streams.leading,
            embed=self.noisy_embeddings(examples, corruption),
            entry=streams.enter,
            beside=streams.beside,
            attention=streams.attention,
            last=LastLayer(streams) if self.target.halves else None,
            leave=streams.leave,
            exit=denoise_before_head(model, block, corruption, corruption.condition),
        )

    def plain_passage(self, inputs: Inputs) -> Passage:
        inputs, together = apart(inputs)
        if together is None:
            return Passage(inputs)
        sight = Sight(self.sides, opened=False, together=together)
        return Passage(inputs, beside=sight.beside, attention=sight.attention)

    def prefix(self) -> Prefix:
        """An empty cache for one block."""
        return Prefix(self.anatomy.axes, self.sides)

    def level(self, model: nn.Module, block: int, corruption: Corruption) -> Level:
        """What evaluations of one block at the level of `corruption` have in common."""
        condition = corruption.condition
        return Level(
            condition,
            conditioning(model).get_submodule("clean")[str(block)],  # type: ignore[index]
            along(corruption.scaling.c_in(corruption.sigma), corruption.z),
            Denoising.at(corruption),
            modulated_denoised(model, block, corruption, condition),
        )

    def next_passage(self, inputs: Inputs, z: Tensor, level: Level, prefix: Prefix | None) -> Passage:
        """How a block denoises the one token after a clean prefix, in an ordinary causal pass.

        Args:
            inputs: the prefix and any token after it, [N, n + 1].
            z: [N, 1, d].
            prefix: what is cached of the prefix; None runs all of it.
        """
        _, length = self.tokens(inputs).shape
        if prefix is not None:
            prefix.begin(length)
        new = length if prefix is None else prefix.new
        sequence = positions_axis(self.anatomy.axes)
        denoised = level.denoising.of(z)

        def embed(out: Tensor, look_up: Change) -> Tensor:
            return torch.cat([out[:, :-1], (z * level.entering(look_up, self.embedding.rows, out)).to(out.dtype)], 1)

        def leave(stream: Tensor) -> Tensor:
            """As long as it came, since what follows may ask for that; only the last position is read."""
            last = stream.narrow(sequence, stream.shape[sequence] - 1, 1)
            return last.expand([length if i == sequence else n for i, n in enumerate(last.shape)])

        return Passage(
            inputs,
            level.conditions(new),
            same=lambda: new - 1,
            filled=level.filled.setdefault(new, {}) if new <= STEADY else None,
            embed=embed,
            entry=None if prefix is None else prefix.enter,
            beside=None if prefix is None else prefix.beside,
            attention=None if prefix is None else prefix.attention,
            leave=leave,
            exit=lambda features: level.read(denoised(features.narrow(1, 0, 1))),
        )

    def noisy_embeddings(self, examples: int, corruption: Corruption) -> Embed:
        """Puts c_in z, at the scale of the network's own embeddings, in the place of the second half of the batch."""
        noisy = along(corruption.scaling.c_in(corruption.sigma), corruption.z) * corruption.z
        rows = self.embedding.rows

        def embed(out: Tensor, look_up: Change) -> Tensor:
            return torch.cat([out[:examples], (noisy * spread(look_up, rows, out.device)).to(out.dtype)])

        return embed

    def told(self, model: nn.Module, expected: Tensor, z: Tensor) -> Tensor:
        """Of noisy positions only: of a clean one nothing is predicted."""
        return above_mean(expected, self.table(model))


def apart(inputs: Inputs) -> tuple[Inputs, Tensor | None]:
    """The network's own inputs, and which positions belong to one document, [N, S, S]; None when all do."""
    documents = inputs.get(DOCUMENTS)
    rest = {name: value for name, value in inputs.items() if name != DOCUMENTS}
    return rest, None if documents is None else one_document(documents)


def both_conditions(clean: Tensor, noisy: Tensor) -> Tensor:
    """Of clean and noisy positions: [width] and [N, width] to [N, 2, width], or [N, S, width] to [N, 2S, width]."""
    if noisy.dim() == 2:
        return torch.stack([clean.expand_as(noisy), noisy], 1)
    return torch.cat([clean.expand_as(noisy), noisy], 1)
