"""The proof by numbers: what the graph says is tried on the network itself.

Names and Jacobians prove nothing here. What decides: with all modulation at zero and gates at one the converted
network IS the original, to the last bit; with gates at zero a pre-norm layer is the identity, to the last bit;
blocks run one after the other are the whole stack; and every scale, shift and gate reaches the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Check
from dbconvert.errors import Refused
from dbconvert.graph.analysis import Inputs, grow_batch
from dbconvert.graph.inject import PREFIX, eject, inject
from dbconvert.graph.run import Run
from dbconvert.graph.stability import function_sites, moved
from dbconvert.graph.tape import Recording, record, tensors
from dbconvert.graph.untouched import awake, fast_paths, no_fast_paths, unchanged_state
from dbconvert.graph.values import item, joined, look_up, put_in

WIDTH = 8
SHORTER = 3
DRAWS = 16
LOUD, APART = 0.5, 0.01
"""Size of random modulation, and how far two evaluations may lie apart, of the largest number."""
Outputs = list[Tensor]


def prove(model: nn.Module, anatomy: Anatomy, inputs: Inputs) -> Anatomy:
    """Converts `model`, compares it with the original, and restores it.

    Returns the anatomy with the checks that were made.

    Raises:
        Refused: a check fails; the error names it.
    """
    with unchanged_state(model), no_fast_paths():
        model.eval()
        cases = variants(model, inputs)
        references = {name: run_case(model, case, train=name == TRAIN) for name, case in cases.items()}
        made = calls_stay(model, anatomy, cases)
        run = inject(model, anatomy, blocks=1, width=WIDTH, start="original")
        try:
            checks = [passed(equals_original(model, run, anatomy, cases, references))]
            checks.append(passed(blocks_chain(model, run, anatomy, inputs)))
            checks.extend(map(passed, made))
            if modulations(model):
                checks.append(passed(sites_reach_output(model, run, anatomy, inputs)))
            if not anatomy.post_norm and all(layer.branches for layer in anatomy.layers):
                checks.append(passed(gates_silence(model, run, anatomy, inputs)))
        finally:
            eject(model)
    return replace(anatomy, proof=tuple(checks))


def passed(check: Check) -> Check:
    """Raises Refused if it is not."""
    if not check.passed:
        raise Refused(
            f"the proof by numbers failed: {check.name}",
            node=check.detail,
            kind="proof",
            hint="please report the network: its graph looked convertible",
        )
    return check


# -- the checks -----------------------------------------------------------------------------------------------


def equals_original(
    model: nn.Module, run: Run, anatomy: Anatomy, cases: dict[str, Inputs], references: dict[str, Outputs]
) -> Check:
    """With modulation at zero the converted network gives the original's outputs, whatever the condition."""
    differing = []
    for name, case in cases.items():
        run.condition = condition_for(case, anatomy)
        try:
            outputs = run_case(model, case, train=name == TRAIN)
        except RuntimeError as error:
            differing.append(f"{name} ({error})")
            continue
        same = [torch.equal(a, b) for a, b in zip(outputs, references[name], strict=True)]
        if not all(same):
            differing.append(name)
    run.reset()
    detail = f"differs at: {', '.join(differing)}" if differing else f"at: {', '.join(cases)}"
    return Check("converted network equals the original to the last bit", not differing, detail)


def calls_stay(model: nn.Module, anatomy: Anatomy, cases: dict[str, Inputs]) -> list[Check]:
    """Sites at function calls meet the same calls in every case; asked only where there are such sites."""
    if not any(True for _ in function_sites(anatomy)):
        return []
    recordings = {name: record_case(model, case, train=name == TRAIN) for name, case in cases.items()}
    first = next(iter(recordings.values()))
    differing = [f"{name}: {place}" for name, one in recordings.items() for place in moved(anatomy, first, one)]
    detail = "; ".join(differing) if differing else f"at: {', '.join(cases)}"
    return [Check("sites at function calls stay where they are", not differing, detail)]


def blocks_chain(model: nn.Module, run: Run, anatomy: Anatomy, inputs: Inputs) -> Check:
    """Blocks run one after the other, each in its own forward pass of the network, are the whole stack."""
    name = "blocks run one after the other equal the whole stack"
    if anatomy.calls > 1:
        return Check(name, True, "not asked of a looped stack")
    whole = stream_after(model, run, anatomy, inputs, None, None)
    cut = max(1, anatomy.depth // 2)
    if bool(anatomy.layers[cut - 1].second_in) != bool(anatomy.layers[cut].second_in):
        cut -= 1  # not where two streams become one, outside of any layer
    between: list[Tensor] = []
    with streams_between(model, anatomy, cut - 1, between):
        stream = stream_after(model, run, anatomy, inputs, range(cut), None)
    entering = None if joined(anatomy) else stream
    with streams_between(model, anatomy, cut, between):
        stream = stream_after(model, run, anatomy, inputs, range(cut, anatomy.depth), entering)
    same = torch.equal(stream, whole)
    return Check(name, same, f"layers 0-{cut - 1}, then {cut}-{anatomy.depth - 1}")


def gates_silence(model: nn.Module, run: Run, anatomy: Anatomy, inputs: Inputs) -> Check:
    """With gates at zero every pre-norm layer hands its stream on unchanged."""
    loud: list[str] = []
    hooks = []
    for layer in anatomy.layers:
        module = model.get_submodule(layer.path)

        def compare(_: nn.Module, args: Any, kwargs: Any, out: Any, layer: Any = layer) -> None:
            if not torch.equal(look_up(args, kwargs, layer.stream_in), item(out, layer.stream_out)):
                loud.append(layer.path)

        hooks.append(module.register_forward_hook(compare, with_kwargs=True))
    for modulation in modulations(model):
        modulation.gate_offset = 0.0
    run.condition = condition_for(inputs, anatomy)
    try:
        run_case(model, inputs)
        loud.extend(loud_around(model, run, anatomy, inputs))
    finally:
        for hook in hooks:
            hook.remove()
        for modulation in modulations(model):
            modulation.gate_offset = 1.0
        run.reset()
    detail = f"not the identity: {', '.join(loud)}" if loud else f"all {anatomy.depth} layers"
    return Check("with gates at zero every layer is the identity", not loud, detail)


def loud_around(model: nn.Module, run: Run, anatomy: Anatomy, inputs: Inputs) -> list[str]:
    """Layers with their additions around them that change the stream: each runs alone, with all others handing on."""
    loud = []
    for index, layer in enumerate(anatomy.layers):
        if layer.around is None:
            continue
        before: list[Tensor] = []
        run.active, run.keep = range(index, index + 1), True
        run.entry = lambda stream, before=before: before.append(stream) or stream
        run_case(model, inputs)
        if run.leaving is None or not torch.equal(before[0], run.leaving):
            loud.append(layer.path)
    return loud


def sites_reach_output(model: nn.Module, run: Run, anatomy: Anatomy, inputs: Inputs) -> Check:
    """Every scale, shift and gate has a gradient, and no fused path of evaluation leaves one out."""
    with awake(model), unchanged_state(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
        silent = silent_layers(model, run, anatomy, inputs, train=False)
        trains_silent = silent_layers(model, run, anatomy, inputs, train=True)
    name = "every site reaches the output"
    if silent:
        return Check(name, False, f"no gradient in: {', '.join(silent)}")
    if trains_silent:
        return Check(name, False, f"training ({', '.join(trains_silent)}) takes a path of its own past them")
    if fused_past(model, run, anatomy, inputs):
        return Check(name, False, "evaluation takes a fused path past them")
    return Check(name, True, "gradients of all scales, shifts and gates")


def silent_layers(model: nn.Module, run: Run, anatomy: Anatomy, inputs: Inputs, *, train: bool) -> list[str]:
    """Layers with a scale, shift or gate without gradient; of train mode, whose passes may drop branches by chance, in
    all of `DRAWS` passes."""
    silent: list[str] = []
    for seed in range(DRAWS if train else 1):
        torch.manual_seed(seed)
        model.train(train)
        run.condition = as_trained(condition_for(inputs, anatomy))
        outputs = [o for _, o in tensors(model(**inputs)) if o.is_floating_point() and o.requires_grad]
        try:
            sum((random_like(o) * o).sum() for o in outputs).backward()  # type: ignore[union-attr]
        except RuntimeError as error:
            raise backward_fails(error) from None
        finally:
            run.reset()
        grads = {int(i): (m.linear.bias.grad, m) for i, m in getattr(model, PREFIX).modulation.items()}
        silent = [anatomy.layers[i].path for i, (g, m) in grads.items() if g is None or not parts_alive(g, m)]
        if not silent:
            break
    model.zero_grad(set_to_none=True)
    return silent


def as_trained(condition: Tensor) -> Tensor:
    """The same, with a graph behind it that all layers share, as the noise embedder's."""
    return condition * torch.ones_like(condition, requires_grad=True)


def fused_past(model: nn.Module, run: Run, anatomy: Anatomy, inputs: Inputs) -> bool:
    """Whether evaluation as torch does it by itself gives something else than with its fused paths off, once scales,
    shifts and gates are not what they are in the original."""
    linears = [modulation.linear for modulation in modulations(model)]
    outputs: list[Outputs] = []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in linears:
            linear.bias.copy_(LOUD * torch.randn(linear.bias.shape, generator=generator))
    for fused in (False, True):
        run.condition = condition_for(inputs, anatomy)
        with fast_paths(fused):
            outputs.append(run_case(model, inputs))
        run.reset()
    with torch.no_grad():
        for linear in linears:
            linear.bias.zero_()
    pairs = [pair for pair in zip(*outputs, strict=True) if pair[0].is_floating_point()]
    return any(bool((a - b).abs().max() > APART * b.abs().max()) for a, b in pairs)


def backward_fails(error: RuntimeError) -> Refused:
    reason = str(error).split(". Hint", 1)[0].strip()
    if "second time" in reason:
        return Refused(
            "layers run a backward pass of their own through the conditioning, which they share",
            kind="backward",
            hint="call torch.utils.checkpoint.checkpoint with use_reentrant=False, or leave it out: "
            "train.checkpointing=true checkpoints layers",
        )
    return Refused(
        f"a backward pass through the network fails: {reason}",
        kind="backward",
        hint="a write in place (x += y, nn.ReLU(inplace=True) on a stream that others read) is the usual cause",
    )


def parts_alive(grad: Tensor, modulation: Any) -> bool:
    sizes = [size for features in modulation.norms for size in (features, features)] + list(modulation.gates)
    return all(bool(part.abs().sum() > 0) for part in torch.split(grad, sizes))


# -- running the network --------------------------------------------------------------------------------------

TRAIN = "train mode"


def variants(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """The example input, a larger batch and a shorter sequence where the network takes them, and train mode."""
    cases = {
        "the example input": inputs,
        "another batch size": grow_batch(inputs),
        "another length": shorten(inputs),
    }
    usable = {name: case for name, case in cases.items() if case is not None and runs(model, case)}
    return {**usable, TRAIN: inputs}


def shorten(inputs: Inputs) -> Inputs | None:
    """Token inputs, integer [B, S], cut by a few positions; None if there are none."""
    tokens = [v for v in inputs.values() if is_tokens(v)]
    if not tokens or tokens[0].shape[1] <= SHORTER:
        return None
    return {name: v[:, :-SHORTER] if is_tokens(v) else v for name, v in inputs.items()}


def is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def runs(model: nn.Module, case: Inputs) -> bool:
    try:
        run_case(model, case)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False
    return True


def run_case(model: nn.Module, case: Inputs, *, train: bool = False) -> Outputs:
    """Outputs of one forward pass; the random numbers of train mode are fixed, its writes to buffers undone."""
    with unchanged_state(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        model.train(train)
        torch.manual_seed(0)
        return [output for _, output in tensors(model(**case))]


def record_case(model: nn.Module, case: Inputs, *, train: bool) -> Recording:
    with unchanged_state(model), torch.random.fork_rng(devices=[]):
        model.train(train)
        return record(model, (), case, deep=True)


def stream_after(
    model: nn.Module, run: Run, anatomy: Anatomy, inputs: Inputs, active: range | None, stream: Tensor | None
) -> Tensor:
    """The stream that leaves the stack when `active` layers run, on their own input or on a given one."""
    entry: Callable[[Tensor], Tensor] | None = None if stream is None else lambda _: stream
    run.active, run.entry, run.keep = active, entry, True
    try:
        run_case(model, inputs)
    except (TypeError, AttributeError) as error:
        raise Refused(
            f"the network fails where layers hand their stream on: {error}",
            node=anatomy.stack,
            kind="proof",
            hint="what else a layer returns is None then: the network must do without it, as without an auxiliary loss",
        ) from None
    leaving = run.leaving
    run.reset()
    if leaving is None:
        raise Refused("the stack was not reached", node=anatomy.stack, kind="proof")
    return leaving


@contextmanager
def streams_between(model: nn.Module, anatomy: Anatomy, index: int, between: list[Tensor]) -> Iterator[None]:
    """Meanwhile a layer leaves what it returns of its second stream in `between`, or takes what lies there already;
    where streams become one, of the first one too, since that is not of one shape all through."""
    layer = anatomy.layers[index]
    module = model.get_submodule(layer.path)
    streams = [(layer.stream_in, layer.stream_out)] if joined(anatomy) else []
    streams += [(layer.second_in, layer.second_out)] if layer.second_in else []
    if not streams:
        yield
        return

    def leave(_: nn.Module, args: Any, out: Any) -> None:
        between.extend(item(out, leaving) for _, leaving in streams)

    def enter(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for at, stream in zip(streams, between, strict=True):
            args, kwargs = put_in(args, kwargs, at[0], stream)
        return args, kwargs

    hook = module.register_forward_pre_hook(enter, with_kwargs=True) if between else module.register_forward_hook(leave)
    try:
        yield
    finally:
        hook.remove()


def condition_for(inputs: Inputs, anatomy: Anatomy) -> Tensor:
    """One vector an example; a network may take several rows an example, as one for each codebook."""
    rows = next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor))
    batch = min(rows, rows * anatomy.stream_shape[anatomy.axes.batch] // anatomy.inputs[0].shape[0])
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(batch))


def random_like(value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)


def modulations(model: nn.Module) -> list[Any]:
    return list(getattr(model, PREFIX).modulation.values())
