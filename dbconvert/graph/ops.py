"""What single graph nodes do, as far as a residual stream is concerned."""

from __future__ import annotations

import copy
import operator

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from dbconvert.anatomy import Change

ADDITIONS = {"add", "iadd", "radd", "add_"}
DIFFERENCES = {"sub", "isub", "sub_", "subtract"}
RESHAPES = {
    "clone", "contiguous", "expand", "flatten", "movedim", "permute", "reshape", "squeeze", "transpose", "swapaxes",
    "unflatten", "unsqueeze", "view", "view_as", "reshape_as", "getattr", "t",
}  # fmt: skip
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "requires_grad_", "detach"}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}
TRANSPOSED_ATTRIBUTES = {"T", "mT", "H", "mH", "data"}
SHAPED_LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}
SHAPE_ONLY = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "new_tensor",
}  # fmt: skip
SCALINGS = {"mul", "rmul", "imul", "mul_", "div", "truediv"}
SOFTMAXES = {nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax"}
NORM_FUNCTIONS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}
ACTIVATIONS = {"relu", "gelu", "silu", "leaky_relu", "elu", "mish", "hardswish", "relu_", "tanh", "sigmoid"}
NORM_MODULES = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm,
)  # fmt: skip


def function_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "__name__", "")
    return name.strip("_") if name.startswith("__") else name


def module_of(node: fx.Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that an addition adds (its first two arguments, where both are nodes)."""
    found = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
    return found[:2]


def is_addition(node: fx.Node) -> bool:
    """A sum of two tensors, unscaled."""
    if function_name(node) not in ADDITIONS or node.kwargs.get("alpha", 1) != 1:
        return False
    return len(operands(node)) == 2 and is_floating(node)


def adds_scaled(node: fx.Node) -> bool:
    """x - f or x + a f in one call: of two tensors only the first is added as it is."""
    name = function_name(node)
    if name not in DIFFERENCES and not (name in ADDITIONS and node.kwargs.get("alpha", 1) != 1):
        return False
    return len(operands(node)) == 2 and is_floating(node)


def is_padding(node: fx.Node) -> bool:
    """As many axes as before, in their order."""
    source = first(node)
    if function_name(node) != "pad" or source is None:
        return False
    return len(source.meta.get("shape") or ()) == len(node.meta.get("shape") or ())


def is_floating(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


def size(node: fx.Node) -> int:
    shape = node.meta.get("shape")
    return -1 if shape is None else int(torch.Size(shape).numel())


def same_shape(node: fx.Node, other: fx.Node) -> bool:
    return node.meta.get("shape") is not None and node.meta["shape"] == other.meta.get("shape")


def first(node: fx.Node) -> fx.Node | None:
    """The node's first argument, if that is a node."""
    candidates = (*node.args, *node.kwargs.values())
    return candidates[0] if candidates and isinstance(candidates[0], fx.Node) else None


def unchanged(node: fx.Node) -> fx.Node | None:
    """The node whose numbers this one hands on (cast, view, dropout in eval), or None if it makes new ones."""
    source = first(node)
    if source is None:
        return None
    if node.op == "call_module":
        return source if node.meta.get("alias") else None
    name = function_name(node)
    if name == "getattr" and node.args[1] not in TRANSPOSED_ATTRIBUTES:
        return None
    if node.target is operator.getitem and node.meta.get("shape") is not None and source.meta.get("shape") is None:
        return None  # an item of a tuple: its producer decides
    whole_slice = name == "getitem" and same_shape(node, source) and only_slices(node.args[1])
    passes = whole_slice or name in RESHAPES | CASTS | DROPOUTS
    return source if passes and size(source) == size(node) else None


def only_slices(index: object) -> bool:
    """Whether an index only cuts ranges out with a forward step; of the full size it is then the whole tensor."""
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return all(part is ... or (isinstance(part, slice) and part.step in (None, 1)) for part in parts)


def axis_before(node: fx.Node, axis: int) -> int | None:
    """Where an axis of a node's value lies in the value it was `unchanged` from; None if it was split or merged.

    Views are run again on a tensor that counts along one axis: no knowledge of their arguments is needed.
    """
    source = first(node)
    if source is None or node.op != "call_function" or function_name(node) not in RESHAPES:
        return axis  # casts, dropouts and whole slices keep all axes
    before, after = source.meta["shape"], node.meta["shape"]
    wanted = counting(after, axis)
    for candidate in range(len(before)):
        if before[candidate] == after[axis]:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: counting(n.meta["shape"], 0))
            args = (counting(before, candidate), *args[1:])
            if torch.equal(node.target(*args, **kwargs), wanted):  # type: ignore[operator]
                return candidate
    return None


def counting(shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """0, 1, 2, ... along one axis, constant along the others."""
    line = torch.arange(shape[axis] if shape else 1)
    return line.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape).clone()


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose numbers this one is computed from: not those that only lend their shape, type or device."""
    if function_name(node) in SHAPE_ONLY:
        return []
    if function_name(node) in SHAPED_LIKE:
        source = first(node)
        return [] if source is None else [source]
    return node.all_input_nodes


def origin(node: fx.Node) -> fx.Node:
    """The node that first made these numbers."""
    while (source := unchanged(node)) is not None:
        node = source
    return node


def stays(leaving: fx.Node, entering: fx.Node) -> bool:
    """Whether a value is another one, or a plain view of it."""
    node: fx.Node | None = entering
    while node is not None:
        if node is leaving:
            return True
        node = None if node.op == "call_module" else unchanged(node)
    return False


def scaled(node: fx.Node) -> fx.Node | None:
    """x, if the node is x times (or over) a number or a weight, as inline layer scale is."""
    if function_name(node) not in SCALINGS:
        return None
    values = [a for a in node.args[:2] if isinstance(a, fx.Node) and not is_vector_weight(a)]
    return values[0] if len(values) == 1 else None


def elementwise(node: fx.Node) -> Change | None:
    """What a node does to every number of its first argument by itself: times or over a number, or tanh."""
    name = function_name(node)
    if name == "tanh":
        return Change("tanh")
    by = node.args[1] if len(node.args) > 1 else None
    if name not in SCALINGS or not isinstance(by, int | float):
        return None
    return Change("divide" if "div" in name else "multiply", float(by))


def normalised(node: fx.Node, model: nn.Module) -> Change | None:
    """A softmax over the last axis, or its logarithm."""
    module = module_of(node, model)
    name, axis = function_name(node), node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        name, axis = SOFTMAXES[type(module)], module.dim
    last = len(node.meta.get("shape") or ()) - 1
    return Change(name) if name in SOFTMAXES.values() and axis in (-1, last) else None


def shifted(node: fx.Node) -> fx.Node | None:
    """x, if the node is x plus a weight of one entry, or one a channel."""
    terms = operands(node) if is_addition(node) else []
    values = [term for term in terms if not is_vector_weight(term)]
    return values[0] if len(values) == 1 and same_shape(values[0], node) else None


def is_vector_weight(node: fx.Node) -> bool:
    """A weight with one entry, or one a channel."""
    return node.op == "get_attr" and sum(n > 1 for n in node.meta["shape"]) <= 1


def is_norm_module(module: nn.Module | None) -> bool:
    """A normalisation: one of torch's, or a childless module with vector weights that ignores its input's scale, or
    that stands in for one by its weights alone, w x + b."""
    if module is None:
        return False
    if isinstance(module, NORM_MODULES):
        return True
    parameters = list(module.parameters())
    if any(True for _ in module.children()) or not parameters or any(p.dim() != 1 for p in parameters):
        return False
    return normalises(module, parameters[0])


def normalises(module: nn.Module, like: torch.Tensor) -> bool:
    """Whether f(3x) = f(x), or f(x) = w x + b, on random numbers; a module whose weights hold no numbers is tried with
    ones in their place."""
    if not without_numbers(like):
        return behaves_as_norm(module, like)
    plain = tuple((k, v) for k, v in vars(module).items() if isinstance(v, int | float | str) and k != "training")
    key = (type(module), tuple(p.shape for p in module.parameters()), plain)
    if key not in _tried:
        _tried[key] = behaves_as_norm(with_ones(module), torch.ones(like.shape))
    return _tried[key]


_tried: dict[object, bool] = {}
"""Modules with ones for weights differ by nothing else: a hundred layers' norms are tried once."""


def behaves_as_norm(module: nn.Module, like: torch.Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, like.shape[0], generator=generator).to(like.device, like.dtype)
    try:
        with torch.no_grad():
            at_x, at_3x, at_0, at_1 = (module(v) for v in (x, 3 * x, torch.zeros_like(x), torch.ones_like(x)))
            ignores_scale = torch.allclose(at_x, at_3x, rtol=1e-2, atol=1e-2)
            affine = torch.allclose(at_x, at_0 + x * (at_1 - at_0), atol=1e-5)
            return at_x.shape == x.shape and (ignores_scale or affine)
    except Exception:  # the network's own code, on a made-up input
        return False


def without_numbers(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def with_ones(module: nn.Module) -> nn.Module:
    """A childless module that shares everything with `module` but its tensors, which are ones."""
    other = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        tensors = getattr(module, kind)
        setattr(other, kind, {n: t if t is None else torch.ones(t.shape) for n, t in tensors.items()})
    return other


def is_norm(node: fx.Node, model: nn.Module) -> bool:
    return is_norm_module(module_of(node, model)) or function_name(node) in NORM_FUNCTIONS


def is_activation(node: fx.Node, model: nn.Module) -> bool:
    module = module_of(node, model)
    if module is not None:
        return type(module).__module__ == "torch.nn.modules.activation" and not any(True for _ in module.parameters())
    return function_name(node) in ACTIVATIONS
