"""Backpropagation through more layers than a block's: what training in blocks is compared with."""

from __future__ import annotations

from dbconvert.engine.method import Method
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.errors import UsageError
from dbconvert.plan import Plan
from dbconvert.recipe import BACKPROPAGATE, Recipe


class EndToEnd(Method):
    """All layers of the original network, a looped core as often as it runs."""

    name = "end-to-end"


class Shallow(Method):
    """The shallow control: only the first block's layers, B times the updates; of a looped core one round."""

    name = "shallow"

    def layers(self, plan: Plan) -> range:
        return plan.layers_of(0)

    def settle(self, network: BlockwiseNetwork, recipe: Recipe) -> None:
        if looped(network.plan):
            network.rounds = 1

    def pace(self, plan: Plan) -> int:
        return len(plan.blocks)

    def layer_calls(self, plan: Plan) -> int:
        return len(plan.layers_of(0))


class TruncatedBPTT(Method):
    """A looped core with gradients through its last rounds only."""

    name = "truncated-bptt"

    def settle(self, network: BlockwiseNetwork, recipe: Recipe) -> None:
        asked, rounds = recipe.train.backpropagate, network.plan.anatomy.calls
        if not looped(network.plan):
            raise UsageError(
                "train.method=truncated-bptt is for networks whose layers run again and again",
                hint="use train.method=end-to-end",
            )
        if (asked or 0) > rounds:
            raise UsageError(
                f"train.backpropagate={asked}, and the core runs {rounds} times",
                hint=f"at most {rounds}, which is train.method=end-to-end",
            )
        network.backpropagate = asked or min(BACKPROPAGATE, rounds)


def looped(plan: Plan) -> bool:
    return plan.target is not None and plan.target.loop is not None
