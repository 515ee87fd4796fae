"""What the DiffusionBlocks paper (arXiv 2506.14202) measured by number of blocks: the evidence there is for a B."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Study:
    """One network and task of the paper.

    Args:
        figures: by number of blocks.
        end_to_end: the same network trained as a whole, None where the paper's table has no such row.
    """

    task: str
    figure: str
    higher_is_better: bool
    figures: dict[int, float]
    end_to_end: float | None


STUDIES = (
    Study("DiT-L/2, 24 layers, ImageNet", "FID", False, {2: 9.90, 3: 11.11, 4: 11.90, 6: 14.43}, 12.09),
    Study("DiT-S/2, 12 layers, CIFAR-10", "FID", False, {2: 35.47, 3: 38.03, 4: 45.43, 6: 53.32}, 39.83),
    Study("autoregressive, 12 layers, LM1B", "MAUVE", True, {2: 0.61, 3: 0.65, 4: 0.67, 6: 0.62}, 0.50),
    Study("ViT, 12 layers, CIFAR-100", "accuracy in %", True, {3: 59.30}, 60.25),
    Study("ViT, 12 layers, Tiny-ImageNet", "accuracy in %", True, {2: 36.16}, 35.32),
    Study("masked diffusion, 12 layers, text8", "bits a character", False, {3: 1.45}, 1.56),
)
SEVERAL = (
    "the paper varied the number of blocks on three tasks, with 2, 3, 4 and 6 of them; classification only at one B"
)


def evidence(blocks: int) -> tuple[str, ...]:
    """What the paper found at so many blocks, a line a task; what it found nearest, where it did not try."""
    if blocks == 1:
        return ("one block is the whole network, conditioned: nothing is cut, and nothing saved against end-to-end",)
    lines = [line(study, blocks) for study in STUDIES if blocks in study.figures]
    if lines:
        return tuple(lines)
    tried = sorted({count for study in STUDIES for count in study.figures})
    nearest = min(tried, key=lambda count: abs(count - blocks))
    untried = f"the paper tried no {blocks} blocks ({SEVERAL}); nearest to it:"
    return (untried, *(line(study, nearest) for study in STUDIES if nearest in study.figures))


def line(study: Study, blocks: int) -> str:
    better = "higher" if study.higher_is_better else "lower"
    end = "" if study.end_to_end is None else f", end-to-end {study.end_to_end:.2f}"
    return f"{study.task}: {study.figure} {study.figures[blocks]:.2f} with {blocks} blocks{end} ({better} is better)"


STEP = "the paper's ViT took 0.0507 s an update end-to-end, and 3 x 0.0181 s for one update of each of its 3 blocks"
