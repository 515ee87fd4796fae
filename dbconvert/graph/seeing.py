"""Who sees whom in a converted network, found by changing one token at a time.

A network for masked tokens must see both ways. A causal one is opened, and opening is tried: some attention makes its
mask where nothing can change it, and recurrent layers have none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Embedding, Path, SideAxes
from dbconvert.errors import Refused
from dbconvert.graph.inject import inject
from dbconvert.graph.oracle import WIDTH, attempt, longest_that_runs, outspoken, side_axes
from dbconvert.graph.run import Run
from dbconvert.graph.sight import Sight
from dbconvert.graph.untouched import no_fast_paths
from dbconvert.graph.values import item

REACTS = 1e-6
"""An output that moves by more than this, over the largest, has seen the changed token."""


def ask_both_ways(model: nn.Module, anatomy: Anatomy) -> tuple[tuple[SideAxes, ...], bool]:
    """Tries to let a network see both ways, and to keep documents apart.

    Returns the axes of what its layers receive beside the stream, and whether masks keep documents apart.

    Raises:
        Refused: a layer of a causal network does not see what sees it; the error names the first.
    """
    embedding = anatomy.embedding
    assert embedding is not None
    with no_fast_paths(), torch.no_grad(), torch.random.fork_rng(devices=[]), outspoken(model, anatomy):
        tokens = longest_that_runs(model, embedding)[:1]
        sides = side_axes(model, anatomy, embedding, tokens.expand(2, -1))
        run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
        trial = Trial(model, anatomy, run, embedding, tokens, sides)
        if anatomy.causal is not False:
            trial.refuse_one_way()
        return tuple(sides.values()), trial.keeps_apart()


class Trial:
    """A converted network and what it is tried on.

    Args:
        tokens: [1, S].
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        run: Run,
        embedding: Embedding,
        tokens: Tensor,
        sides: Mapping[Path, SideAxes],
    ) -> None:
        self.model, self.anatomy, self.run = model, anatomy, run
        self.embedding, self.tokens, self.sides = embedding, tokens, sides

    def seen(self, active: range | None, together: Tensor | None = None) -> Tensor:
        """[S, S] bool: whether the output at i (second) moves when token j (first) changes."""
        length = self.tokens.shape[1]
        changed = self.tokens.repeat(length + 1, 1)
        place = torch.arange(length)
        changed[place, place] = (changed[place, place] + 1) % self.embedding.rows
        sight = Sight(
            self.sides,
            opened=self.anatomy.causal is not False,
            together=None if together is None else together.expand(length + 1, -1, -1),
        )
        self.run.reset()
        self.run.active = active
        self.run.beside, self.run.attention = sight.beside, sight.attention
        head = self.anatomy.head
        assert head is not None
        out: Tensor = item(self.model(**{self.embedding.argument: changed}), head.output)
        moved: Tensor = (out[:-1] - out[-1]).abs().amax(-1)
        return moved > REACTS * out.abs().max()

    def refuse_one_way(self) -> None:
        for index, layer in enumerate(self.anatomy.layers):
            seen = self.seen(range(index, index + 1))
            if not torch.equal(seen, seen.T):
                raise one_way(f"{layer.path} ({layer.type})")
        if not bool(self.seen(None).diagonal(-1).all()):
            raise one_way(self.anatomy.stack)

    def keeps_apart(self) -> bool:
        """Whether nothing crosses a border in the middle where masks forbid it, and all is seen beside it."""
        length = self.tokens.shape[1]
        document = torch.arange(length) * 2 // length
        together = (document[:, None] == document)[None]

        def crossings() -> float:
            return float(self.seen(None, together)[~together[0]].sum())

        return attempt(crossings) == 0.0


def one_way(node: str) -> Refused:
    return Refused(
        "positions do not see the later ones that see them, although no mask hides the future",
        node=node,
        kind="one-way",
        hint="the causal mask can only be removed where it is an argument of the layer or of "
        "torch.nn.functional.scaled_dot_product_attention: use --task causal_lm, or give a bidirectional network",
    )
