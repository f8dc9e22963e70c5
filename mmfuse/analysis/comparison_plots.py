"""Pictures of a comparison of strategies: how well each does, and what that costs.

Drawn as in `mmfuse.analysis.plots`: matplotlib's objects without pyplot, and colours that colour-blind readers can tell
apart. Strategies differ by their marks, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from mmfuse.analysis.plots import BLUE, DPI, GREY, INK, ORANGE, SOFT

COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK, GREY, "#882255")
MARKS = "osD^vP*X<>"
#: Points (1/72 inch) between the marks of strategies that cost the same, and the share of the axis that counts as same.
SIDESTEP, SAME_COST = 11.0, 0.025


@dataclass(frozen=True)
class Point:
    """One strategy.

    Attributes:
        label: its name.
        mean: exact match over seeds and questions, 0..1.
        low: where its interval begins.
        high: where it ends.
        by_seed: exact match of each run.
        blind: exact match without the image; None if it was not measured.
        flops: of a training sample.
    """

    label: str
    mean: float
    low: float
    high: float
    by_seed: Sequence[float]
    blind: float | None
    flops: float


def plot_quality(points: Sequence[Point], path: str | PathLike[str]) -> None:
    """Exact match of each strategy with its interval, each of its runs, and the blind score.

    Args:
        points: from top to bottom.
        path: PNG or SVG.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("there are no strategies to plot")
    figure = Figure(figsize=(8.0, 1.35 + 0.55 * len(points)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    middle = np.arange(len(points), dtype=float)
    means = np.array([point.mean for point in points])
    # Rounding may put the end of an interval a hair inside the mean.
    spread = np.clip([[p.mean - p.low for p in points], [p.high - p.mean for p in points]], 0.0, None)
    axes.errorbar(
        means, middle, xerr=spread, fmt="o", ms=8, color=BLUE, elinewidth=2.0, capsize=5, capthick=2.0,
        label="exact match, 95 % interval",
    )  # fmt: skip
    runs = [(score, at + 0.26) for at, point in zip(middle, points, strict=True) for score in point.by_seed]
    axes.plot(*np.array(runs).T, "|", ms=7, mew=1.4, color=INK, label="a run")
    blind = [(point.blind, at) for at, point in zip(middle, points, strict=True) if point.blind is not None]
    if blind:
        axes.plot(*np.array(blind).T, "D", ms=6, mfc="white", mec=GREY, mew=1.6, label="image replaced by its mean")
    for at, point in zip(middle, points, strict=True):
        axes.text(1.035, at, f"{100 * point.mean:.1f} %", va="center", fontsize=11, fontweight="bold", color=INK)
    # A point at either end shows as a whole.
    axes.set(xlim=(-0.015, 1.015), ylim=(len(points) - 0.5, -0.5))
    axes.set_yticks(middle, labels=[point.label for point in points], fontsize=11)
    axes.set_xticks(np.linspace(0, 1, 6), labels=[f"{percent} %" for percent in range(0, 101, 20)], fontsize=10)
    axes.grid(axis="x", color="#ECEDEF")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, fontsize=10, frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_quality_against_flops(points: Sequence[Point], path: str | PathLike[str]) -> None:
    """Exact match of each strategy with its interval over the FLOPs of a training sample.

    Strategies that cost the same, or nearly, stand side by side, because their intervals would cover each other.

    Args:
        points: in the order of the legend.
        path: PNG or SVG.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("there are no strategies to plot")
    figure = Figure(figsize=(8.0, 4.4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    exponent = 3 * (math.floor(math.log10(max(1.0, *(point.flops for point in points)))) // 3)
    unit = 10.0**exponent
    for number, (point, step) in enumerate(zip(points, sidesteps(points), strict=True)):
        shift = axes.transData + ScaledTranslation(step * SIDESTEP / 72, 0, figure.dpi_scale_trans)
        spread = [[max(0.0, point.mean - point.low)], [max(0.0, point.high - point.mean)]]
        axes.errorbar(
            [point.flops / unit], [point.mean], yerr=spread, fmt=MARKS[number % len(MARKS)], ms=8,
            color=COLOURS[number % len(COLOURS)], elinewidth=1.6, capsize=4, label=point.label, transform=shift,
        )  # fmt: skip
    _frame(axes, [p.flops / unit for p in points], min(p.low for p in points), max(p.high for p in points))
    axes.set_xlabel(f"FLOPs of a training sample, {_unit_name(exponent)}", color=INK)
    axes.set_ylabel("exact match, 95 % interval", color=INK)
    figure.legend(loc="outside right upper", fontsize=10, frameon=False)
    figure.savefig(path, dpi=DPI)


def sidesteps(points: Sequence[Point]) -> list[float]:
    """How many places each point stands to the right of its own, so that points of equal cost stand side by side."""
    reach = SAME_COST * max(point.flops for point in points)
    groups: list[list[int]] = []
    for number in sorted(range(len(points)), key=lambda number: points[number].flops):
        if groups and points[number].flops - points[groups[-1][0]].flops <= reach:
            groups[-1].append(number)
        else:
            groups.append([number])
    steps = {number: place - (len(group) - 1) / 2 for group in groups for place, number in enumerate(group)}
    return [steps[number] for number in range(len(points))]


def _frame(axes: Axes, flops: Sequence[float], low: float, high: float) -> None:
    """Room for the intervals between `low` and `high`, to whole tenths, and for marks that step aside."""
    ends = math.floor(10 * low - 0.01) / 10, math.ceil(10 * high + 0.01) / 10
    bottom, top = max(0.0, ends[0]), min(1.0, ends[1])
    ticks = np.linspace(bottom, top, round(10 * (top - bottom)) + 1)
    # FLOPs begin at 0: a narrow axis would make 2 % look like a lot. A point at the top shows as a whole.
    axes.set(xlim=(0, 1.15 * max(flops)), ylim=(bottom - 0.03 * (top - bottom), top + 0.03 * (top - bottom)))
    axes.set_yticks(ticks, labels=[f"{100 * tick:.0f} %" for tick in ticks], fontsize=10)
    axes.grid(color="#ECEDEF")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.set_axisbelow(True)


def _unit_name(exponent: int) -> str:
    names = {0: "single", 3: "thousands", 6: "millions", 9: "billions (10⁹)", 12: "trillions (10¹²)"}
    return names.get(exponent, f"10^{exponent}")
