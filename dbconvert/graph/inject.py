"""Conditioning put into a network: the graph said where, the original modules still run.

Norms, gate sites and layers get a subclass made on the fly, in place. Their forward, parameters and names stay;
the conditioning vector travels as the last positional argument of the layer, so that it survives activation
checkpointing, and hooks that read the first argument still find the stream. Everything new is registered under
one child of the network, `dbconvert`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Axes, Layer, Path
from dbconvert.conditioning.embedding import NoiseEmbedding
from dbconvert.conditioning.modulation import Modulation, Start, gate, modulate
from dbconvert.errors import DBConvertError, Refused
from dbconvert.graph.values import imitate, item, look_up, put_in, replaced

PREFIX = "dbconvert"
"""Name of the child of a converted network that holds all that conversion adds."""


class Volatile:
    """State of one forward pass: copies and pickles of the network start without it."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self.volatile()}

    @classmethod
    def volatile(cls) -> set[str]:
        return {name for name, value in vars(cls).items() if value is None}


class Run(Volatile):
    """What the converted network is to do in its next forward pass. Reset by `BlockwiseNetwork` for every call.

    Args:
        active: the layers that run; the others hand the stream on. None runs all, as the original network does.
        condition: conditioning vector of the active layers, [N, width], or None for the original layers.
        entry: changes the stream as it enters the stack.
        exit: changes what enters the head.
        keep: whether to keep the stream that leaves the last layer, as `leaving`.
    """

    active: range | None = None
    condition: Tensor | None = None
    entry: Callable[[Tensor], Tensor] | None = None
    exit: Callable[[Tensor], Tensor] | None = None
    keep: bool | None = None
    leaving: Tensor | None = None

    def reset(self) -> None:
        self.active = self.condition = self.entry = self.exit = self.keep = self.leaving = None


class Site(Volatile):
    """A module whose inputs or output are modulated or gated; the layer fills in the values before it runs."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    by: Tensor | None = None

    def __init__(self) -> None:
        self.norm_axes = self.gate_axes = Axes(0, -1)
        self.arguments: tuple[Path, ...] = ()
        self.output: Path = ()


class SiteModule(nn.Module):
    """Mixed into the class of a site."""

    db_site: Site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        site = self.db_site
        shift, scale, by = site.shift, site.scale, site.by
        if shift is not None and scale is not None and site.arguments:
            for path in site.arguments:
                value = modulate(look_up(args, kwargs, path), shift, scale, site.norm_axes)
                args, kwargs = put_in(args, kwargs, path, value)
        out = super().forward(*args, **kwargs)
        if shift is not None and scale is not None and not site.arguments:
            out = modulate(out, shift, scale, site.norm_axes)
        if by is not None:
            out = replaced(out, site.output, gate(item(out, site.output), by, site.gate_axes))
        return out


class LayerModule(nn.Module):
    """Mixed into the class of a layer: runs it, conditioned, when it is active, and hands the stream on otherwise."""

    db_run: Run
    db_index: int
    db_last: bool
    db_layer: Layer
    db_sites: list[tuple[Site, int | None, int | None]]
    db_modulation: tuple[Modulation]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.db_run
        if run.entry is not None and self.db_index == 0:
            stream = run.entry(look_up(args, kwargs, self.db_layer.stream_in))
            args, kwargs = put_in(args, kwargs, self.db_layer.stream_in, stream)
        if run.active is None or self.db_index in run.active:
            out = super().__call__(*args, run.condition, **kwargs)
        else:
            out = imitate(self.db_layer, look_up(args, kwargs, self.db_layer.stream_in))
        if run.keep and self.db_last:
            run.leaving = item(out, self.db_layer.stream_out)
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        *args, condition = args  # type: ignore[assignment]
        pairs, gates = ([], []) if condition is None else self.db_modulation[0](condition)
        for site, norm, by in self.db_sites:
            site.shift, site.scale = pairs[norm] if pairs and norm is not None else (None, None)
            site.by = gates[by] if gates and by is not None else None
        return super().forward(*args, **kwargs)


class HeadModule(nn.Module):
    """Mixed into the class of the head: the task may change the features that enter it."""

    db_run: Run

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        change = self.db_run.exit
        return super().forward(features if change is None else change(features), *args, **kwargs)


class Conditioning(nn.Module):
    """All parameters that conversion adds: an embedder a block, a modulation a layer, and what a task registers."""

    def __init__(self, anatomy: Anatomy, blocks: int, width: int, start: Start) -> None:
        super().__init__()
        self.embedder = nn.ModuleDict({str(b): NoiseEmbedding(width) for b in range(blocks)})
        self.modulation = nn.ModuleDict(
            {str(i): layer_modulation(layer, width, start) for i, layer in enumerate(anatomy.layers)}
        )

    def forward(self, value: Any) -> Any:
        """Hands on what it is given: an nn.Sequential that is converted calls all its children, this one too."""
        return value


def inject(model: nn.Module, anatomy: Anatomy, *, blocks: int, width: int, start: Start) -> Run:
    """Puts conditioning into `model`, in place, and returns the handle that steers its forward passes.

    Args:
        blocks: how many noise embedders to make.
        width: of the conditioning vector.

    Raises:
        Refused: `zero` for a post-norm network, which no gate turns into the identity.
        DBConvertError: the network is converted already.
    """
    if start == "zero" and anatomy.post_norm:
        raise Refused(
            "something stands on the residual stream after the addition (post-norm), so that no gate makes a layer the "
            "identity",
            node=next(node for layer in anatomy.layers for node in layer.on_spine),
            kind="post-norm-zero",
            hint="use --start original",
        )
    if hasattr(model, PREFIX):
        raise DBConvertError(f"the network has a child named {PREFIX} already", hint="convert the original network")
    conditioning = Conditioning(anatomy, blocks, width, start)
    model.add_module(PREFIX, conditioning)
    run = Run()
    for index, layer in enumerate(anatomy.layers):
        module = model.get_submodule(layer.path)
        inject_layer(module, index, layer, conditioning, run, last=index == anatomy.depth - 1)
    if anatomy.head is not None:
        head = model.get_submodule(anatomy.head.module)
        swap_class(head, HeadModule)
        head.db_run = run  # type: ignore[assignment]
    return run


def inject_layer(
    module: nn.Module, index: int, layer: Layer, conditioning: Conditioning, run: Run, *, last: bool
) -> None:
    norms, gates = slots(layer)
    sites: dict[str, tuple[Site, int | None, int | None]] = {}
    for branch in layer.branches:
        for path, norm in ((branch.norm.module, True), (branch.gate.module, False)):
            site, norm_slot, gate_slot = sites.get(path, (Site(), None, None))
            if norm:
                site.norm_axes, site.arguments = branch.norm.axes, branch.norm.arguments
                norm_slot = norms[branch.norm.module]
            else:
                site.gate_axes, site.output = branch.gate.axes, branch.gate.output
                gate_slot = gates[branch.gate.module]
            sites[path] = (site, norm_slot, gate_slot)
    for path, (site, _, _) in sites.items():
        target = module.get_submodule(path)
        swap_class(target, SiteModule)
        target.db_site = site  # type: ignore[assignment]
    swap_class(module, LayerModule)
    # A tuple keeps the modulation from being registered as the layer's own: its keys live under PREFIX.
    attributes: dict[str, Any] = {"db_run": run, "db_index": index, "db_layer": layer, "db_last": last}
    attributes["db_sites"] = list(sites.values())
    attributes["db_modulation"] = (conditioning.modulation[str(index)],)
    module.__dict__.update(attributes)


def eject(model: nn.Module) -> None:
    """Undoes `inject`: original classes, nothing registered."""
    for module in model.modules():
        mixins = (SiteModule, LayerModule, HeadModule)
        while type(module).__mro__[1] in mixins:
            module.__class__ = type(module).__mro__[2]
        for name in [name for name in module.__dict__ if name.startswith("db_")]:
            del module.__dict__[name]
    delattr(model, PREFIX)


def slots(layer: Layer) -> tuple[dict[str, int], dict[str, int]]:
    """Which of the modulation's outputs belongs to which module: norm sites and gate sites by path."""
    norms = {path: i for i, path in enumerate(dict.fromkeys(b.norm.module for b in layer.branches))}
    gates = {path: i for i, path in enumerate(dict.fromkeys(b.gate.module for b in layer.branches))}
    return norms, gates


def site_features(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channel sizes of a layer's norm sites and gate sites, in slot order."""
    norms = {b.norm.module: b.norm.features for b in layer.branches}
    gates = {b.gate.module: b.gate.features for b in layer.branches}
    return tuple(norms.values()), tuple(gates.values())


def layer_modulation(layer: Layer, width: int, start: Start) -> Modulation:
    return Modulation(width, *site_features(layer), start)


# -- classes made on the fly --------------------------------------------------------------------------------


def swapped(mixin: type, cls: type) -> type:
    """The subclass of `cls` with `mixin` in front; one object for each pair, importable and picklable."""
    name = f"{mixin.__name__}_{cls.__module__.replace('.', '_')}_{cls.__qualname__.replace('.', '_')}"
    made = globals().get(name)
    if made is None or made.__mro__[2] is not cls:
        made = type(name, (mixin, cls), {"__module__": __name__, "__reduce_ex__": reduce_swapped})
        globals()[name] = made
    return made


def swap_class(module: nn.Module, mixin: type) -> None:
    module.__class__ = swapped(mixin, type(module))


def reduce_swapped(self: nn.Module, protocol: int) -> Any:
    """Pickles name the mixin and the original class, so that another process can make the subclass again."""
    made = type(self)
    return blank, (made.__mro__[1], made.__mro__[2]), self.__dict__


def blank(mixin: type, cls: type) -> nn.Module:
    made = swapped(mixin, cls)
    module: nn.Module = object.__new__(made)
    return module
