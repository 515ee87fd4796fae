"""What a network IS, as found by the analysis: frozen facts that print, store and compare.

Everything here is data. A plan carries an Anatomy, and with the network's source that is enough to convert it
again in another process without analysing it.
"""

from __future__ import annotations

from typing import Literal

from dbconvert.schema import record

Path = tuple[int | str, ...]
"""Where a tensor sits in arguments or an output: positions and keys, outermost first. () is the value itself."""

Verdict = Literal["accepted", "restricted", "looped"]
Placement = Literal["pre", "end", "inner", "spine", "input", "layer"]
"""Where a branch's norm stands: before the branch (pre-norm), at its end, inside it, on the spine after the
addition (post-norm); `input` when there is none and the branch's input is modulated instead; `layer` when the
branch is a whole layer that an adapter named."""


@record
class Adapter:
    """A user's answers where the graph shows no stack: where the layers are, what enters them, what leaves them.

    Args:
        layers: module paths in any order; a container that is never called stands for its children.
        enters: the argument that carries the stream into a layer: a position or a keyword, and items below it.
        leaves: the item of a layer's output that carries it out; () when the output is the stream.
    """

    layers: tuple[str, ...]
    enters: Path = (0,)
    leaves: Path = ()


@record
class Axes:
    """Axes of a tensor; `channel` counts from the end (-1 is the last), `batch` from the front."""

    batch: int
    channel: int


@record
class FunctionCall:
    """The `nth` call, from 0, of the torch function `name` while a module runs, its children included."""

    name: str
    nth: int


@record
class Use:
    """An argument of a function call in which a layer reads its stream."""

    call: FunctionCall
    argument: Path
    axes: Axes


@record
class NormSite:
    """Where scale and shift act: on the output of `module` or on its inputs at `arguments`; where the layer has no
    such module, on the result of `call` or on all of `uses`, while `module` runs.

    Args:
        node: the graph node.
        module: path relative to the layer; the empty path is the layer itself.
        features: size of the channel axis.
        arguments, uses: for placement `input`, what is modulated; else empty.
    """

    node: str
    module: str
    features: int
    axes: Axes
    arguments: tuple[Path, ...] = ()
    call: FunctionCall | None = None
    uses: tuple[Use, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Two branches whose sites have one key share them."""
        return self.module, self.call, self.uses


@record
class GateSite:
    """Where the gate acts: on the output of `module` (relative to the layer) at `output`, or on the result of `call`
    while `module` runs. With `against`, what the gate takes away is filled up with that argument of the module."""

    node: str
    module: str
    features: int
    axes: Axes
    output: Path = ()
    call: FunctionCall | None = None
    against: Path | None = None

    @property
    def key(self) -> tuple[object, ...]:
        return self.module, self.call


@record
class Branch:
    """One residual branch: h + gate * f(norm(h) * (1 + scale) + shift), added at node `addition`."""

    addition: str
    placement: Placement
    norm: NormSite
    gate: GateSite


@record
class BranchPart:
    """A module that computes one branch of a layer whose additions are written around it.

    Args:
        path: module path in the network.
        stream_in, stream_out, form: as of a layer.
    """

    path: str
    stream_in: Path
    stream_out: Path
    form: str


@record
class Around:
    """How a layer runs that is never called itself, as a pair of modules in a list: x = attention(x) + x.

    Args:
        module: path of the module whose forward adds.
        parts: one for each addition, in order.
    """

    module: str
    parts: tuple[BranchPart, ...]


@record
class SideInput:
    """A tensor that a layer receives beside the stream; `shared` when all layers receive the same one."""

    argument: Path
    shape: tuple[int, ...]
    dtype: str
    shared: bool


@record
class SideAxes:
    """Which axes of a side input, a tensor that a layer receives beside the stream, are whose.

    Args:
        batch: the axis along which examples lie, perhaps several rows each; None where all share one.
        sequence: the axes of positions: one for positions and their embeddings, the last two for masks.
    """

    argument: Path
    batch: int | None
    sequence: tuple[int, ...]


@record
class Layer:
    """One layer of the stack.

    Args:
        path: module path in the network.
        type: class name.
        stream_in: argument that carries the residual stream in.
        stream_out: where the stream sits in the output.
        form: container of the output (`tensor`, `tuple:n`, `list:n`, `dict:keys`).
        branches: where conditioning goes; none in a layer that is conditioned already.
        on_spine: nodes that stand on the stream: norms (post-norm), activations, scalings.
        around: how it runs where its additions are written around it; None for a layer that is called.
        conditioned_by: inputs of the network that modulate the layer already (AdaLN): nothing is injected then.
        second_in: argument that carries a second stream in, as the text's; of layers that are conditioned already.
        second_out: where it sits in the output; empty where a layer, the last one, does not return it.
        parameters, bytes: its own parameters.
    """

    path: str
    type: str
    stream_in: Path
    stream_out: Path
    form: str
    branches: tuple[Branch, ...]
    on_spine: tuple[str, ...]
    side_inputs: tuple[SideInput, ...]
    parameters: int
    bytes: int
    around: Around | None = None
    conditioned_by: tuple[str, ...] = ()
    second_in: Path = ()
    second_out: Path = ()


@record
class Embedding:
    """The table that turns the network's token numbers into vectors.

    Args:
        module: path in the network.
        rows, width: of the table.
        argument: the network's argument that holds the numbers, [N, S].
    """

    module: str
    rows: int
    width: int
    argument: str


@record
class Change:
    """What happens to the head's result: `multiply` or `divide` by a number, `tanh`, or, last of all, `softmax` or
    `log_softmax` over the classes."""

    name: str
    by: float | None = None


@record
class Head:
    """The last module before the network's output, where a task meets the features.

    Args:
        module: path in the network.
        features: width of its input.
        outputs: width of its output.
        labels: how many rows of scores these are, where the network's output has them on an axis of their own, [..., L,
            K] with L K = `outputs`.
        output: where its result sits in the network's output.
        token: index of the one token that is read, or None when tokens are pooled or all read.
        pooled: whether the head sees one vector an example.
        after: what is done to its result on the way out, in order, as a softcap (divide, tanh, multiply) or a softmax.
    """

    module: str
    features: int
    outputs: int
    output: Path
    token: int | None
    pooled: bool
    after: tuple[Change, ...] = ()
    labels: int = 1

    @property
    def classes(self) -> int:
        """K."""
        return self.outputs // self.labels


@record
class Picture:
    """The network as a map of images [N, C, H, W], or [N, S, C] of S places, to images.

    Args:
        argument, output: which takes the image, and where the result sits in the network's output.
        channels: of the result: C, or 2 C where the second half is a variance.
        times, labels: arguments with one number an example; labels are looked up in tables.
        classes: rows of the smallest such table, 0 without one.
        time_scale: what the network multiplies its time by, before or in its sines.
    """

    argument: str
    output: Path
    channels: int
    times: tuple[str, ...]
    labels: tuple[str, ...]
    classes: int
    time_scale: float = 1.0


@record
class Part:
    """Modules outside the stack: the stem before it, the readout after it."""

    modules: tuple[str, ...]
    parameters: int
    bytes: int


@record
class Input:
    """An argument of the network's forward, as the analysis fed it; `shared` where all examples have one in common."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shared: bool = False


@record
class Check:
    """One proof by numbers: what was compared, the largest difference, over how many cases."""

    name: str
    passed: bool
    detail: str


@record
class Anatomy:
    """A network that can be cut.

    Args:
        verdict: `accepted` whole, `restricted` to some of its repeated layers, or `looped` (same weights again).
        network: class name.
        stack: path of the module that holds the layers.
        calls: how often each layer is called in one forward pass.
        width: size of the stream's channel axis.
        streams: how many tensors are carried from layer to layer.
        post_norm: whether norms or activations stand on the spine, so that no gate makes a layer the identity.
        left_out: layers of the same container that are not part of the stack.
        outside: parts of layers that other parts of the network use too, and that belong to the periphery.
        embedding: where token numbers become vectors; None where the network takes none.
        picture: how it maps images to images; None where it does not.
        causal: whether no position sees a later one, as tried; None where that was not asked.
        tied: groups of parameter names that are one tensor.
    """

    verdict: Verdict
    network: str
    stack: str
    layers: tuple[Layer, ...]
    calls: int
    width: int
    streams: int
    stream_shape: tuple[int, ...]
    axes: Axes
    post_norm: bool
    stem: Part
    readout: Part
    head: Head | None
    inputs: tuple[Input, ...]
    tied: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    embedding: Embedding | None = None
    picture: Picture | None = None
    causal: bool | None = None
    notes: tuple[str, ...] = ()
    proof: tuple[Check, ...] = ()

    @property
    def depth(self) -> int:
        return len(self.layers)

    def layer_paths(self) -> tuple[str, ...]:
        return tuple(layer.path for layer in self.layers)

    def layer_of(self, key: str) -> int | None:
        """Index of the layer that a parameter or module path belongs to, None for the periphery."""
        if any(key == part or key.startswith(part + ".") for part in self.outside):
            return None
        for index, layer in enumerate(self.layers):
            if key == layer.path or key.startswith(layer.path + "."):
                return index
        return None
