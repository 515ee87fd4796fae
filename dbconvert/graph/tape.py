"""One forward pass written down as a torch.fx graph.

The tape runs the network once, eagerly, on real, fake or meta tensors. Modules without children are leaves
(`call_module`), every torch function outside them is a `call_function`, and every call of any module is kept
with the nodes that went in and came out. Nothing about the network has to be traceable: control flow, caches
and `**kwargs` simply happen.

Each node's `meta` holds `shape` and `dtype` (None unless the value is a tensor), `scope` (paths of the open
modules, outermost first), `calls` (which call of each, as indices into `Recording.calls`), `nth` (for functions: how
many calls of the same name each open module had seen before), `line` (file:line of the code that made it, outside
torch) and `alias` (true if a leaf module handed its unchanged input back).
"""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from dbconvert.errors import Refused

Path = tuple[int | str, ...]
"""Where a value sits inside arguments or an output: positions and keys, outermost first."""

MUTATORS = ("__setitem__",)
DYNAMO = "torch._dynamo.eval_frame"
"""Importing it takes a second, and before somebody has, nothing is compiled."""
NOT_FRAMES = ("/torch/", "/dbconvert/graph/", "<frozen", "<string>")


@dataclass
class ModuleCall:
    """One call of a module: which nodes entered and left, and where they sat.

    Args:
        order: index in `Recording.calls`.
        parents: orders of the calls it was made in, outermost first; `scope` has their paths.
        form: container of the output, as `output_form` names it.
        functions: how many functions of each name it has called so far, its children included.
    """

    path: str
    order: int
    scope: tuple[str, ...]
    parents: tuple[int, ...]
    inputs: list[tuple[Path, fx.Node]]
    outputs: list[tuple[Path, fx.Node]] = field(default_factory=list)
    form: str = ""
    functions: Counter[str] = field(default_factory=Counter)


@dataclass
class Recording:
    """A graph, the calls made on the way, and what the network was given and gave back."""

    graph: fx.Graph
    calls: list[ModuleCall]
    inputs: list[tuple[Path, fx.Node]]
    outputs: list[tuple[Path, fx.Node]]
    decisions: list[fx.Node]
    """Nodes whose value steered Python (`if tensor:`)."""

    def calls_of(self, path: str) -> list[ModuleCall]:
        return [call for call in self.calls if call.path == path]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested tuples, lists and dicts with their paths."""
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def tensors(value: Any) -> list[tuple[Path, Tensor]]:
    return [(path, leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor)]


def argument_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Path, Any]]:
    """Leaves of a call's arguments: the first step of a path is a position or a keyword."""
    return [*leaves(args), *leaves(kwargs)]


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, deep: bool = False) -> Recording:
    """Runs `model(*args, **kwargs)` without gradients and writes the tape.

    Args:
        deep: also look into childless modules of the user's own that hold matrices, as whole layers may be written.

    Raises:
        Refused: the network holds compiled or scripted parts, which hide what they compute.
    """
    refuse_opaque(model)
    return _Tape(model, deep).run(args, kwargs)


@contextmanager
def as_written() -> Iterator[None]:
    """Meanwhile code that torch.compile was put around runs as it is written, and nothing is compiled."""
    with torch.compiler.set_stance("force_eager") if DYNAMO in sys.modules else nullcontext():
        yield


def refuse_opaque(model: nn.Module) -> None:
    dynamo = sys.modules.get(DYNAMO)
    for path, module in model.named_modules():
        if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            raise Refused(
                "a compiled module hides what it computes",
                node=path or type(module).__name__,
                kind="compiled",
                hint="give the network before torch.compile (its `_orig_mod`); compile after conversion",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise Refused(
                "a scripted module hides what it computes",
                node=path or type(module).__name__,
                kind="scripted",
                hint="give the Python module that was scripted",
            )


def describe(node: fx.Node) -> str:
    """How a node is named to people: its name, the module it ran in, the source line."""
    scope = node.meta.get("scope") or ()
    module = str(node.target) if node.op == "call_module" else (scope[-1] if scope else "")
    parts = [f"node {node.name}"]
    if module:
        parts.append(f"in {module}")
    if node.meta.get("line"):
        parts.append(f"at {node.meta['line']}")
    return " ".join(parts)


class _Tape(TorchFunctionMode):
    """The recorder itself: a torch function mode plus hooks on every module of the model."""

    def __init__(self, model: nn.Module, deep: bool) -> None:
        super().__init__()
        self.model = model
        self.graph = fx.Graph()
        self.node_of: dict[int, fx.Node] = {}
        self.alive: list[Tensor] = []  # node_of is keyed by id(): a tensor that dies could lend its id to another
        self.inside_leaf = 0
        self.versions: dict[int, int] = {}  # of the open leaf's inputs: a write in place counts them up
        self.open: list[ModuleCall] = []
        self.calls: list[ModuleCall] = []
        self.decisions: list[fx.Node] = []
        self.path_of = {id(module): path for path, module in model.named_modules()}
        childless = [m for m in model.modules() if m is not model and not any(True for _ in m.children())]
        self.leaf_modules = {id(m) for m in childless if not (deep and holds_matrices(m))}
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        self.attribute_of = {id(tensor): name for name, tensor in named}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
        inputs = []
        for path, leaf in argument_leaves(args, kwargs):
            if isinstance(leaf, Tensor) and id(leaf) not in self.node_of:
                node = self.add("placeholder", "input_" + "_".join(map(str, path)))
                self.bind(leaf, node)
                inputs.append((path, node))
        hooks = self.install_hooks()
        try:
            with self, torch.no_grad():
                out = self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        outputs = [(path, self.node_for(leaf)) for path, leaf in tensors(out)]
        self.graph.output(tuple(node for _, node in outputs))
        self.graph.lint()
        recording = Recording(self.graph, self.calls, inputs, outputs, self.decisions)
        self.alive.clear()
        return recording

    # -- values and nodes ---------------------------------------------------------------------------------

    def bind(self, value: Any, node: fx.Node) -> None:
        """Makes `node` the origin of every tensor inside `value`."""
        tensor = isinstance(value, Tensor)
        node.meta["shape"] = tuple(value.shape) if tensor else None
        node.meta["dtype"] = value.dtype if tensor else None
        if tensor:
            self.node_of[id(value)] = node
            self.alive.append(value)
        elif isinstance(value, (tuple, list, dict)) and not isinstance(value, torch.Size):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if tensors(item):
                    self.bind(item, self.add("call_function", operator.getitem, (node, key)))

    def add(self, op: str, target: Any, args: Any = (), kwargs: Any = None, name: str | None = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {}, name=name)
        node.meta["scope"] = tuple(call.path for call in self.open)
        node.meta["calls"] = tuple(call.order for call in self.open)
        node.meta["line"] = user_line()
        return node

    def node_for(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self.node_of:
            target = self.attribute_of.get(id(tensor), f"_constant{len(self.alive)}")
            self.bind(tensor, self.add("get_attr", target))
        return self.node_of[id(tensor)]

    def freeze(self, value: Any) -> Any:
        """A value as fx holds it: nodes for tensors, plain data as it is, a short text for anything else."""
        if isinstance(value, Tensor):
            return self.node_for(value)
        if isinstance(value, dict):
            return {str(key): self.freeze(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(self.freeze(item) for item in value)
        if isinstance(value, slice):
            return slice(*(self.freeze(part) for part in (value.start, value.stop, value.step)))
        plain = (int, float, bool, str, complex, type(None), type(...), torch.dtype, torch.device)
        return value if isinstance(value, plain) else repr(value)[:60]

    # -- functions ----------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {id(leaf): leaf._version for _, leaf in argument_leaves(args, kwargs) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        handed_back = isinstance(out, Tensor) and given.get(id(out)) == out._version
        if not self.inside_leaf and not handed_back:
            self.note_function(func, args, kwargs, out)
        for call in self.open:
            call.functions[called(func)] += 1
        return out

    def note_function(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], out: Any) -> None:
        name = called(func)
        if name == "__bool__":
            self.decisions.append(self.add("call_function", func, self.freeze(args), name="bool"))
            self.decisions[-1].meta.update(shape=None, dtype=None)
        elif name in MUTATORS:
            self.bind(args[0], self.add("call_function", func, self.freeze(args), name="setitem"))
        elif name == "__get__":
            if isinstance(out, Tensor) and id(out) not in self.node_of:
                attribute = getattr(getattr(func, "__self__", None), "__name__", "attribute")
                self.bind(out, self.add("call_function", getattr, (self.node_for(args[0]), attribute)))
        elif name != "__set__" and tensors(out):
            node = self.add("call_function", func, self.freeze(args), self.freeze(kwargs), name.strip("_") or "op")
            node.meta["nth"] = tuple(call.functions[name] for call in self.open)
            self.bind(out, node)

    # -- modules ------------------------------------------------------------------------------------------

    def install_hooks(self) -> list[Any]:
        hooks = []
        for module in self.model.modules():
            hooks.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(self.leave, with_kwargs=True))
        return hooks

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.inside_leaf:
            self.inside_leaf += 1
            return
        given = argument_leaves(args, kwargs)
        call = ModuleCall(
            path=self.path_of[id(module)],
            order=len(self.calls),
            scope=tuple(c.path for c in self.open),
            parents=tuple(c.order for c in self.open),
            inputs=[(path, self.node_for(leaf)) for path, leaf in given if isinstance(leaf, Tensor)],
        )
        self.calls.append(call)
        self.open.append(call)
        if id(module) in self.leaf_modules and not joins(module, given):
            self.inside_leaf = 1
            self.versions = {id(leaf): leaf._version for _, leaf in given if isinstance(leaf, Tensor)}

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if self.inside_leaf > 1:
            self.inside_leaf -= 1
            return None
        call = self.open.pop()
        replaced = None
        if self.inside_leaf:
            self.inside_leaf = 0
            node = self.add(
                "call_module", call.path, self.freeze(args), self.freeze(kwargs), call.path.replace(".", "_")
            )
            if isinstance(out, Tensor) and id(out) in self.node_of:
                # Identity, and dropout in eval, hand their input back: give the output an identity of its own.
                node.meta["alias"] = self.versions.get(id(out)) == out._version
                with torch._C.DisableTorchFunction():
                    replaced = out = out.view_as(out)
            self.bind(out, node)
        call.outputs = [(path, self.node_for(leaf)) for path, leaf in tensors(out)]
        call.form = output_form(out)
        return replaced


def holds_matrices(module: nn.Module) -> bool:
    """Whether a module that is not torch's own has weights of more than one axis."""
    return not type(module).__module__.startswith("torch.") and any(p.dim() > 1 for p in module.parameters())


def joins(module: nn.Module, given: list[tuple[Path, Any]]) -> bool:
    """Whether a childless module without matrices combines tensors, as one that adds or scales and adds: it is open."""
    floating = [leaf for _, leaf in given if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1]
    return len(floating) > 1 and all(p.dim() < 2 for p in module.parameters())


def called(function: Callable[..., Any]) -> str:
    """The name that a torch function goes by."""
    return getattr(function, "__name__", "function")


def output_form(out: Any) -> str:
    """The container of a module's output: `tensor`, `tuple:n`, `list:n`, `dict:key,key` or a type's name."""
    if isinstance(out, Tensor):
        return "tensor"
    if type(out) in (tuple, list):
        return f"{type(out).__name__}:{len(out)}"
    if type(out) is dict:
        return "dict:" + ",".join(map(str, out))
    return type(out).__name__


def user_line() -> str:
    """file:line of the innermost frame outside torch and this package."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not any(part in filename for part in NOT_FRAMES):
            return f"{filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
