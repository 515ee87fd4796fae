"""Looped networks for tests, in the ways people write them: a prelude, a core that runs again and again, a coda."""

from types import SimpleNamespace

import torch
from networks import VOCABULARY, WIDTH, Block, tokens
from torch import nn

from dbconvert.engine.convert import converted
from dbconvert.engine.decide import decide
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.opening import Example, Opened
from dbconvert.graph.analysis import analyse
from dbconvert.plan import NoiseRule, SourceRef
from dbconvert.recipe import SplitOptions
from dbconvert.tasks.recurrent import Recurrent


class Looped(nn.Module):
    """State, then rounds of `mix` and the layers.

    Args:
        form: `concat`, `add`, or `none`, where the state begins as the prelude's result and nothing is taken up.
    """

    def __init__(self, form="concat", layers=2, rounds=4, causal=True):
        super().__init__()
        self.form, self.rounds = form, rounds
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.prelude, self.coda = Block(causal=causal), Block(causal=causal)
        self.adapter = nn.Linear(2 * WIDTH, WIDTH) if form == "concat" else None
        self.core = nn.ModuleList(Block(causal=causal) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def begin(self, given):
        return given if self.form == "none" else torch.zeros_like(given)

    def mix(self, state, given):
        if self.form == "none":
            return state
        return state + given if self.form == "add" else self.adapter(torch.cat([state, given], -1))

    def one_round(self, state, given, turn):
        state = self.mix(state, given)
        for layer in self.core:
            state = layer(state)
        return state

    def loop(self, given):
        state = self.begin(given)
        for turn in range(self.rounds):
            state = self.one_round(state, given, turn)
        return state

    def forward(self, ids):
        return self.head(self.norm(self.coda(self.loop(self.prelude(self.tokens(ids))))))


class RandomState(Looped):
    """Huginn's own way: the state begins as noise."""

    def begin(self, given):
        return torch.randn_like(given)


class Core(nn.Module):
    def __init__(self, rounds=4):
        super().__init__()
        self.adapter = nn.Linear(2 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block(causal=True) for _ in range(2))
        self.config = SimpleNamespace(loops=rounds)

    def forward(self, given):
        state = torch.zeros_like(given)
        for _ in range(self.config.loops):
            state = self.adapter(torch.cat([state, given], -1))
            for layer in self.layers:
                state = layer(state)
        return state


class InSubmodule(nn.Module):
    """The loop, and what says how long it is, in a module of their own."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.prelude, self.coda, self.core = Block(causal=True), Block(causal=True), Core()

    def forward(self, ids):
        return self.head(self.coda(self.core(self.prelude(self.tokens(ids)))))


class Mixer(nn.Module):
    """One module without children that takes the state and what the prelude made."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))

    def forward(self, given, state):
        return state @ self.weight + given


class ByModule(Looped):
    def __init__(self):
        super().__init__("add")
        self.mixer = Mixer()

    def mix(self, state, given):
        return self.mixer(given, state)


class ByArgument(Looped):
    def forward(self, ids, steps=4):
        given = self.prelude(self.tokens(ids))
        state = self.begin(given)
        for turn in range(steps):
            state = self.one_round(state, given, turn)
        return self.head(self.norm(self.coda(state)))

    def __init__(self):
        super().__init__()
        del self.rounds


class Fixed(Looped):
    """Nothing says how often the core runs."""

    def loop(self, given):
        state = self.begin(given)
        for turn in (0, 1, 2, 3):
            state = self.one_round(state, given, turn)
        return state


class Halting(Looped):
    """Goes on until the state settles."""

    def loop(self, given):
        state = self.begin(given)
        for turn in range(self.rounds):
            before, state = state, self.one_round(state, given, turn)
            if (state - before).abs().max() < 1e-9:
                break
        return state


class Numbered(Looped):
    """Every round is told its number."""

    def mix(self, state, given):
        return super().mix(state, given)

    def one_round(self, state, given, turn):
        return super().one_round(state, given + 0.3 * turn, turn)


class NormedAfter(Looped):
    """The state is changed between two rounds."""

    def one_round(self, state, given, turn):
        return torch.tanh(super().one_round(state, given, turn))


def recurrent_network(model, table=None, start="original"):
    """(network with random conditioning, its noise intervals)."""
    model, inputs = model.eval(), {"ids": tokens()}
    anatomy = analyse(model, inputs)
    ref = SourceRef("model_file", "build_model", "", (), "")
    opened = Opened(SimpleNamespace(ref=ref), model, inputs, None, 0, anatomy, Example(model, anatomy))
    whole = ((0, anatomy.depth - 1),)
    plan, fit = decide(opened, SplitOptions(start=start, table=table), NoiseRule(), Recurrent, whole)
    task = Recurrent(anatomy, plan.target)
    run = converted(model, plan, task)
    network = BlockwiseNetwork(model, run, task, plan, (0,), "shared").eval()
    network.sigma_data = fit.sigma_data
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.conditioning.named_parameters():
            if name.startswith(("modulation", "readout")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network, fit.intervals()
