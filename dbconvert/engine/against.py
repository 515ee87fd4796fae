"""What blocks are compared with: the baselines of every comparison, and those that are asked for by a word."""

from __future__ import annotations

from dataclasses import dataclass

CUT = ("split.blocks", "split.layers", "split.layers_per_block")
BLOCKS_ONLY = (
    "split.start",
    "split.condition_width",
    "split.table",
    "split.context",
    "split.entry",
    "split.readout",
    "split.modulation",
    "noise.partition",
    "noise.overlap",
    "noise.refit",
    "train.order",
    "train.steps_per_turn",
    "train.after",
    "train.states",
    "train.periphery",
    "train.inactive",
    "train.prefetch",
    "train.z",
    "train.mixed",
    "eval.steps",
)
STAY = ("train.inactive=resident", "train.prefetch=false")
"""Baselines have no blocks that could be away."""
ONE_BLOCK = ("noise.partition", "noise.overlap", "split.context", "train.order", "train.steps_per_turn")
"""What changes nothing where one block holds all layers and all levels."""
NOISE = ("noise.", "train.weight", "eval.draws", "eval.sigmas")


@dataclass(frozen=True)
class Baseline:
    """A form of training that blocks are compared with.

    Args:
        overrides: that make it of any recipe.
        ignores: keys of a recipe that change nothing about it, or their beginnings, with a dot at the end.
        heeds: keys that change something about it, whatever they do to other baselines; likewise.
        optional: a machine, a network or what is installed may not allow it.
    """

    name: str
    overrides: tuple[str, ...]
    ignores: tuple[str, ...]
    heeds: tuple[str, ...] = ()
    optional: bool = False


WHOLE = "end-to-end"
SHALLOW = Baseline("shallow control", ("train.method=shallow",), BLOCKS_ONLY)
ALWAYS = (Baseline(WHOLE, ("train.method=end-to-end",), BLOCKS_ONLY + CUT), SHALLOW)
"""The baselines of every comparison."""
END_TO_END = ALWAYS[0].overrides
CHECKPOINTED = ("train.checkpointing=true", "train.accumulate=1")
LEAN = ("optimizer.name=adamw8bit", *CHECKPOINTED)
IN_BACKWARD = ("optimizer.in_backward=true", "train.clip=null")
TURN = "train.steps_per_turn=20"
AWAY = ("train.method=blocks", "train.order=rotate", TURN)
FIXED = ("train.order", "train.steps_per_turn", "train.inactive", "train.prefetch")
LIGHT = ("train.checkpointing", "train.accumulate", "train.clip", "optimizer.name", "optimizer.in_backward")


def peer(name: str, *overrides: str, ignores: tuple[str, ...], heeds: tuple[str, ...] = ()) -> Baseline:
    return Baseline(name, overrides, ignores, heeds, optional=True)


PEERS = (
    peer("end-to-end, checkpointing", *END_TO_END, *CHECKPOINTED, ignores=(*BLOCKS_ONLY, *CUT, *LIGHT[:2])),
    peer(
        "end-to-end, checkpointing, 8-bit, in backward",
        *(*END_TO_END, *LEAN, *IN_BACKWARD),
        ignores=(*BLOCKS_ONLY, *CUT, *LIGHT),
    ),
    peer("BAdam-style", "train.method=badam", TURN, ignores=BLOCKS_ONLY),
    peer("LISA-style", "train.method=lisa", TURN, ignores=BLOCKS_ONLY),
    peer("LoRA", "train.method=lora", ignores=(*BLOCKS_ONLY, *CUT)),
    peer("blocks, inactive in host memory", *AWAY, "train.inactive=host", ignores=FIXED, heeds=NOISE),
    peer("blocks, inactive on disk", *AWAY, "train.inactive=disk", ignores=FIXED, heeds=NOISE),
    peer(
        "blocks, inactive on disk, checkpointing, 8-bit",
        *(*AWAY, "train.inactive=disk", *LEAN),
        ignores=(*FIXED, *LIGHT[:2], "optimizer.name"),
        heeds=NOISE,
    ),
)
"""What people use today to train in less memory, and blocks that are away while they do not train."""
LABEL_PLACE = ("split.entry", "split.readout")
TOLD = ("split.context", "train.z", "train.mixed")
DEPTH = tuple(
    Baseline(f"{context}, {z}", (f"split.context={context}", f"train.z={z}"), TOLD, NOISE)
    for context, z in (
        ("raw", "noised"),  # the paper's form
        ("features", "noised"),
        ("estimate", "noised"),
        ("raw", "on-policy"),
        ("raw", "mixed"),
        ("features", "on-policy"),
        ("estimate", "on-policy"),
        ("features", "mixed"),
    )
)
"""Forms of training in blocks, by what these hear of each other."""
AGAINST: dict[str, tuple[Baseline, ...]] = {
    "forward-forward": (
        Baseline(
            "Forward-Forward",
            ("train.method=forward-forward",),
            tuple(key for key in (*BLOCKS_ONLY, *CUT) if key not in LABEL_PLACE),
        ),
    ),
    "noprop-dt": (Baseline("NoProp-DT", ("train.method=noprop-dt",), BLOCKS_ONLY, (*LABEL_PLACE, "eval.draws")),),
    "checkpointing": (
        Baseline(
            "end-to-end with activation checkpointing",
            ("train.method=end-to-end", "train.checkpointing=true"),
            (*BLOCKS_ONLY, *CUT, "train.checkpointing"),
        ),
    ),
    "depth": DEPTH,
    **{form.name.replace(", ", "-"): (form,) for form in DEPTH},
    "peers": PEERS,
}
"""Those that are asked for, by the word for them."""
ON_THE_WAY = ("peers",)
"""Words whose rows are compared at equal time too."""
WATCHED = ("eval.every=0.1", "eval.examples=256", "log.every=10")
"""How often quality and what is held are looked at then."""
