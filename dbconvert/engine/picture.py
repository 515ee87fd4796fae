"""The picture of a noise split: the density of p_noise over sigma in bands, one a block."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dbconvert.plan import NoiseFit

POINTS = 600


def draw_noise(noise: NoiseFit, path: Path) -> None:
    """Writes a PNG."""
    from matplotlib.figure import Figure

    intervals = noise.intervals()
    logarithmic = intervals.distribution.logarithmic
    place = math.log if logarithmic else float
    low, high = place(noise.boundaries[0]), place(noise.boundaries[-1])
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for block in range(intervals.blocks):
        start, end = (place(v) for v in intervals.owned(block))
        grid = torch.linspace(start, end, POINTS // intervals.blocks, dtype=torch.float64)
        density = intervals.distribution.density(grid, step=(high - low) / 200)
        share = f"{100 * intervals.share(block):.0f} %"
        colour = f"C{block % 10}"
        levels = grid.exp() if logarithmic else grid
        axes.fill_between(levels, density, color=colour, alpha=0.5, label=f"block {block}: {share}")
        axes.plot(levels, density, color=colour, linewidth=1)
    for boundary in noise.boundaries:
        axes.axvline(boundary, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log" if logarithmic else "linear",
        xlabel=noise.level,
        ylabel="density over ln sigma" if logarithmic else "tokens hidden in a unit of t",
        title=f"noise {noise.rule}: {noise.basis}",
    )
    axes.title.set_fontsize(9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
