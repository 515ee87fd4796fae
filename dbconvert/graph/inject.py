"""Conditioning put into a network: the graph said where, the original modules still run.

Norms, gate sites and layers get a subclass made on the fly, in place. Their forward, parameters and names stay;
the conditioning vector travels as the last positional argument of the layer, so that it survives activation
checkpointing, and hooks that read the first argument still find the stream. Everything new is registered under
one child of the network, `dbconvert`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Around, Axes, GateSite, Layer, NormSite
from dbconvert.conditioning.embedding import NoiseEmbedding
from dbconvert.conditioning.modulation import Curve, Modulation, Start, gate, laid, modulate
from dbconvert.errors import DBConvertError, Refused
from dbconvert.graph.functions import Arguments, Intercepted, Results, uncounted
from dbconvert.graph.joined import AroundModule, PartModule
from dbconvert.graph.looped import LOOPED
from dbconvert.graph.recompute import recomputed
from dbconvert.graph.remade import StandIn, remade, run_again
from dbconvert.graph.run import Filled, Run, Volatile
from dbconvert.graph.values import imitate, item, look_up, put_in, replaced

PREFIX = "dbconvert"
"""Name of the child of a converted network that holds all that conversion adds."""


class Site(Volatile):
    """One place that is modulated or gated; the layer fills in the values before it runs.

    Args:
        at: where it is.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    by: Tensor | None = None
    filled: Filled | None = None

    def __init__(self, at: NormSite | GateSite) -> None:
        self.at = at

    @property
    def active(self) -> bool:
        return self.scale is not None or self.by is not None

    def act(
        self, value: Tensor, axes: Axes | None = None, instead: Tensor | None = None, again: StandIn | None = None
    ) -> Tensor:
        """The value modulated or gated.

        Args:
            axes: the site's own by default.
            instead: fills up what the gate takes away.
            again: makes the value again.
        """
        axes = axes or self.at.axes
        with uncounted():
            fitted = None if self.filled is None or instead is not None else self.fitted(value, axes, self.filled)
            if fitted is not None:
                by, add = fitted
                return value * by if add is None else torch.addcmul(add, value, by)
            if self.shift is not None and self.scale is not None:
                return remade(partial(modulate, axes=axes), value, self.shift, self.scale, again)
            if self.by is None:
                return value
            gated = gate(value, self.by, axes)
            return gated if instead is None else gated + gate(instead, 1 - self.by, axes)

    def fitted(self, value: Tensor, axes: Axes, filled: Filled) -> tuple[Tensor, Tensor | None] | None:
        """What a value of this shape is multiplied by and added to, made once; None where its axes have to be cut."""
        key = self, axes, value.shape
        if key not in filled:
            rows = (self.by,) if self.shift is None else (self.scale, self.shift)
            cut, shaped = laid(value, rows, axes)  # type: ignore[arg-type]
            whole = (shaped[0], None) if self.shift is None else (1 + shaped[0], shaped[1])
            filled[key] = whole if cut is value else None
        found: tuple[Tensor, Tensor | None] | None = filled[key]
        return found


class SiteModule(nn.Module):
    """Mixed into the class of a module that has sites: norms first."""

    db_sites: list[Site]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites, given = [site for site in self.db_sites if site.active], (args, kwargs)
        on_output = []
        results: Results = {}
        arguments: Arguments = {}
        again: StandIn | None = None
        for site in sites:
            at = site.at
            if at.call is not None:
                results.setdefault(at.call, []).append(site.act)
            elif isinstance(at, NormSite) and at.uses:
                for use in at.uses:
                    arguments.setdefault(use.call, []).append((use.argument, partial(site.act, axes=use.axes)))
            elif isinstance(at, NormSite) and at.arguments:
                for path in at.arguments:
                    args, kwargs = put_in(args, kwargs, path, site.act(look_up(args, kwargs, path)))
            else:
                on_output.append(site)
        if results or arguments:
            with Intercepted(results, arguments):
                out = super().forward(*args, **kwargs)
        else:
            out = super().forward(*args, **kwargs)
            if len(on_output) == 1 and isinstance(out, Tensor) and not kwargs:
                again = run_again(self, super().forward, args)
        for site in on_output:
            path = site.at.output if isinstance(site.at, GateSite) else ()
            against = site.at.against if isinstance(site.at, GateSite) else None
            instead = None if against is None else look_up(*given, against)
            out = replaced(out, path, site.act(item(out, path), instead=instead, again=again))
        return out


class LayerSites:
    """All sites of one layer, and the modulation that fills them in.

    Args:
        modulation: one, or none where the layer is conditioned already or has no weights here; in a tuple, which keeps
            it from being registered as the layer's own: its keys live under PREFIX.
    """

    def __init__(self, norms: list[Site], gates: list[Site], modulation: tuple[Modulation, ...]) -> None:
        self.norms, self.gates, self.modulation = norms, gates, modulation

    def fill(self, condition: Tensor | None, filled: Filled | None = None, same: int = 0) -> None:
        """Before the layer runs; `filled` remembers what layers got for one condition, see `Run`; `same` as there."""
        made = None if filled is None else filled.get(self)
        if made is None:
            made = self.modulation[0](condition, same) if condition is not None and self.modulation else ([], [])
        if filled is not None:
            filled[self] = made
        pairs, gates = made
        for position, site in enumerate(self.norms):
            site.shift, site.scale = pairs[position] if pairs else (None, None)
            site.filled = filled
        for position, site in enumerate(self.gates):
            site.by = gates[position] if gates else None
            site.filled = filled

    def clear(self) -> None:
        """Forgets the modulation of a layer that is not here."""
        self.norms, self.gates, self.modulation = [], [], ()


class LayerModule(nn.Module):
    """Mixed into the class of a layer: runs it, conditioned, when it is active, and hands the stream on otherwise."""

    db_run: Run
    db_index: int
    db_last: bool
    db_layer: Layer
    db_layer_sites: LayerSites

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.db_run
        if run.entry is not None and self.db_index == 0:
            stream = run.entry(look_up(args, kwargs, self.db_layer.stream_in))
            args, kwargs = put_in(args, kwargs, self.db_layer.stream_in, stream)
        if not run.runs(self.db_index):
            layer = self.db_layer
            second = look_up(args, kwargs, layer.second_in) if layer.second_in else None
            out = imitate(layer, look_up(args, kwargs, layer.stream_in), second)
        else:
            out = self.executed(args, kwargs)
        if not self.db_last:
            return out
        if run.keep:
            run.leaving = item(out, self.db_layer.stream_out)
        return run.left(out, self.db_layer.stream_out)

    def executed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, stream, call = self.db_run, self.db_layer.stream_in, super().__call__
        if run.last is not None and run.condition is not None and self.ends and not self.recomputes:
            call = partial(run.last, call, stream)
        else:
            args, kwargs = run.given(stream, args, kwargs)
        if not run.recomputes(self.db_index):
            return call(*args, run.condition, **kwargs)
        return recomputed(self, call, look_up(args, kwargs, stream), (*args, run.condition), kwargs)

    @property
    def ends(self) -> bool:
        """Whether no active layer comes after this one."""
        active = self.db_run.active
        return self.db_last if active is None else self.db_index == active[-1]

    @property
    def recomputes(self) -> bool:
        """Whether Transformers runs the layer again for its backward pass, when nobody steers it any more."""
        return self.training and getattr(self, "gradient_checkpointing", False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        *args, condition = args  # type: ignore[assignment]
        run = self.db_run
        self.db_layer_sites.fill(condition, run.filled, 0 if run.same is None else run.same())
        with self.db_run.attending(self.db_index):
            return super().forward(*args, **kwargs)


class EmbeddingModule(nn.Module):
    """Mixed into the class of the token embedding: the task may put other vectors into their place."""

    db_run: Run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return out if self.db_run.embed is None else self.db_run.embed(out, super().forward)


class HeadModule(nn.Module):
    """Mixed into the class of the head: the task may change the features that enter it."""

    db_run: Run

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = self.db_run
        if run.exit is not None:
            features = run.exit(features)
        if run.hold is None:
            return super().forward(features, *args, **kwargs)
        run.hold.append(features)
        return features.new_empty(*features.shape[:-1], 0)


MIXINS = (SiteModule, LayerModule, PartModule, AroundModule, EmbeddingModule, HeadModule, *LOOPED)


class Conditioning(nn.Module):
    """All parameters that conversion adds: an embedder a block, a modulation a layer, and what a task registers."""

    def __init__(self, anatomy: Anatomy, blocks: int, width: int, start: Start, curve: Curve = "linear") -> None:
        super().__init__()
        self.curve = curve
        self.embedder = nn.ModuleDict({str(b): NoiseEmbedding(width) for b in range(blocks)})
        self.modulation = nn.ModuleDict(
            {
                str(i): Modulation(width, *site_features(layer), start, curve)
                for i, layer in enumerate(anatomy.layers)
                if layer.branches
            }
        )

    def forward(self, value: Any) -> Any:
        """Hands on what it is given: an nn.Sequential that is converted calls all its children, this one too."""
        return value


def inject(
    model: nn.Module, anatomy: Anatomy, *, blocks: int, width: int, start: Start, curve: Curve = "linear"
) -> Run:
    """Puts conditioning into `model`, in place, and returns the handle that steers its forward passes.

    Args:
        blocks: how many noise embedders to make.
        width: of the conditioning vector.

    Raises:
        Refused: `zero` for a post-norm network, which no gate turns into the identity.
        DBConvertError: the network is converted already.
    """
    if start == "zero" and anatomy.post_norm and any(layer.branches for layer in anatomy.layers):
        raise Refused(
            "a norm (post-norm), an activation or a scaling stands on the residual stream, so that no gate makes a "
            "layer the identity",
            node=next(node for layer in anatomy.layers for node in layer.on_spine),
            kind="post-norm-zero",
            hint="use --start original",
        )
    if hasattr(model, PREFIX):
        raise DBConvertError(f"the network has a child named {PREFIX} already", hint="convert the original network")
    conditioning = Conditioning(anatomy, blocks, width, start, curve)
    model.add_module(PREFIX, conditioning)
    run = Run()
    for index, layer in enumerate(anatomy.layers):
        inject_layer(model, index, layer, conditioning, run, last=index == anatomy.depth - 1)
    for found, mixin in ((anatomy.embedding, EmbeddingModule), (anatomy.head, HeadModule)):
        if found is not None:
            module = model.get_submodule(found.module)
            swap_class(module, mixin)
            module.db_run = run  # type: ignore[assignment]
    unfuse(model)
    return run


def unfuse(model: nn.Module) -> None:
    """torch's own layers evaluate by a fused pass, which reads weights past the modules: sites would be left out."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.__dict__["db_fused"] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0


def inject_layer(
    model: nn.Module, index: int, layer: Layer, conditioning: Conditioning, run: Run, *, last: bool
) -> None:
    module = model.get_submodule(layer.path)
    norms, gates = ([Site(at) for at in found] for found in distinct_sites(layer))
    for site in (*norms, *gates):
        target = module.get_submodule(site.at.module)
        if not isinstance(target, SiteModule):
            swap_class(target, SiteModule)
            target.__dict__["db_sites"] = []
        target.db_sites.append(site)  # type: ignore[union-attr, operator]
    modulation = (conditioning.modulation[str(index)],) if layer.branches else ()
    own = LayerSites(norms, gates, modulation)  # type: ignore[arg-type]
    shared: dict[str, Any] = {"db_run": run, "db_index": index, "db_layer_sites": own}
    if layer.around is None:
        swap_class(module, LayerModule)
        module.__dict__.update(shared, db_layer=layer, db_last=last)
    else:
        inject_around(model, layer.around, shared, last=last)


def inject_around(model: nn.Module, around: Around, shared: dict[str, Any], *, last: bool) -> None:
    """The parts of a layer whose additions are written around them, and the module that adds."""
    for position, part in enumerate(around.parts):
        module = model.get_submodule(part.path)
        swap_class(module, PartModule)
        final = last and position == len(around.parts) - 1
        module.__dict__.update(shared, db_part=part, db_position=position, db_final=final)
    adding = model.get_submodule(around.module)
    if not isinstance(adding, AroundModule):
        swap_class(adding, AroundModule)
        adding.__dict__["db_run"] = shared["db_run"]


def eject(model: nn.Module) -> None:
    """Undoes `inject`: original classes, nothing registered."""
    for module in model.modules():
        while type(module).__mro__[1] in MIXINS:
            module.__class__ = type(module).__mro__[2]
        if "db_fused" in module.__dict__:
            module.activation_relu_or_gelu = module.db_fused
        for name in [name for name in module.__dict__ if name.startswith("db_")]:
            del module.__dict__[name]
    delattr(model, PREFIX)


def distinct_sites(layer: Layer) -> tuple[list[NormSite], list[GateSite]]:
    """A layer's norm sites and gate sites, those that branches share once, in the order of the modulation's rows."""
    norms = {branch.norm.key: branch.norm for branch in layer.branches}
    gates = {branch.gate.key: branch.gate for branch in layer.branches}
    return list(norms.values()), list(gates.values())


def site_features(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channel sizes of a layer's norm sites and gate sites, in slot order."""
    norms, gates = distinct_sites(layer)
    return tuple(site.features for site in norms), tuple(site.features for site in gates)


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
    """Pickles name the mixins and the original class, so that another process can make the subclass again."""
    mixins, cls = [], type(self)
    while cls.__mro__[1] in MIXINS:
        mixins.append(cls.__mro__[1])
        cls = cls.__mro__[2]
    return blank, (tuple(mixins), cls), self.__dict__


def blank(mixins: tuple[type, ...], cls: type) -> nn.Module:
    for mixin in reversed(mixins):
        cls = swapped(mixin, cls)
    module: nn.Module = object.__new__(cls)
    return module
