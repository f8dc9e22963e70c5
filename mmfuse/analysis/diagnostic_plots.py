"""One picture for each diagnostic of fusion; the numbers are those of `diagnostics.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mmfuse.analysis.comparison_plots import COLOURS
from mmfuse.analysis.plots import BLUE, DPI, GREY, INK, ORANGE

#: By task what a diagnostic says of it.
Found = Mapping[str, Any]


def plot_diagnostics(tasks: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw every diagnostic that some task has, as `NAME.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in PICTURES.items():
        found = {task: own[name] for task, own in tasks.items() if own.get(name)}
        if found:
            path = folder / f"{name}.png"
            draw(found).savefig(path, dpi=DPI)
            written.append(path)
    return written


def _ablation(found: Found) -> Figure:
    figure, axes = _figure(8.0, 1.8 + 0.7 * len(found))
    for offset, (name, label, colour) in enumerate(
        (("blank", "image without structure", BLUE), ("shuffle", "image of another item", ORANGE))
    ):
        rows = [(at, own[name]) for at, own in enumerate(found.values()) if name in own]
        means = np.array([own["mean"] for _, own in rows])
        ends = np.array([[own["low"], own["high"]] for _, own in rows], dtype=float).T
        spread = np.nan_to_num(np.clip([means - ends[0], ends[1] - means], 0, None))
        axes.errorbar(means, [at + 0.22 * (offset - 0.5) for at, _ in rows], xerr=spread, fmt="o", color=colour,
                      capsize=4, label=label)  # fmt: skip
    axes.axvline(0, color=GREY, lw=1)
    axes.set_yticks(range(len(found)), labels=list(found))
    axes.set(ylim=(len(found) - 0.5, -0.5), xlabel="what the image adds to log p of the right answer, nats")
    return _with_legend(figure, axes, 2)


def _dominance(found: Found) -> Figure:
    figure, axes = _figure(8.0, 4.4)
    for (task, own), colour in zip(found.items(), _colours(found), strict=True):
        for key, style in (("with_first_token", "-"), ("without_first_token", ":")):
            mdi = own[key]["mdi"]
            axes.plot(range(len(mdi)), mdi, style, marker="o", ms=4, color=colour, label=task if style == "-" else None)
    axes.plot([], [], ":", color=INK, label="without the first token")
    axes.axhline(1, color=GREY, lw=1)
    axes.set(yscale="log", xlabel="layer", ylabel="MDI: above 1, text is favoured")
    # Powers of ten are of no use where all values lie between two of them.
    for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        place(FuncFormatter(lambda value, _: f"{value:g}"))
    return _with_legend(figure, axes, 3)


def _sinks(found: Found) -> Figure:
    figure, axes = _figure(8.0, 4.0)
    for (task, own), colour in zip(found.items(), _colours(found), strict=True):
        # A step aside for each task: most models have no sinks, and their lines would cover each other.
        aside = 0.03 * (list(found).index(task) - (len(found) - 1) / 2)
        axes.plot(np.arange(len(own["mean"])) + aside, own["mean"], "-o", ms=4, color=colour, label=task)
    axes.set(ylim=(-0.03, 1.03), xlabel="layer", ylabel="share of visual attention on sinks")
    return _with_legend(figure, axes, 3)


def _heads(found: Found) -> Figure:
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(2.2 + 2.9 * columns, 0.6 + 2.9 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False)
    top = max(np.max(own["relative"]) for own in found.values())
    image = None
    for axes, (task, own) in zip(grid.flat, found.items(), strict=False):
        image = axes.imshow(np.array(own["relative"]), cmap="viridis", vmin=0, vmax=max(top, 1e-9), aspect="auto")
        axes.set_title(task, fontsize=10)
        axes.set(xlabel="head", ylabel="layer")
        _whole_numbers(axes)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=grid, label="change of a head's output without the image", shrink=0.8)
    return figure


def _exits(found: Found) -> Figure:
    figure, axes = _figure(8.0, 4.4)
    for (task, own), colour in zip(found.items(), _colours(found), strict=True):
        axes.plot(own["layers"], own["mean"], "-o", ms=4, color=colour, label=task)
        low, high = (np.array(own[key], dtype=float) for key in ("low", "high"))
        if np.isfinite(low).all():
            axes.fill_between(own["layers"], low, high, color=colour, alpha=0.12, lw=0)
    axes.axhline(0, color=GREY, lw=1)
    axes.set(xlabel="first layer without media", ylabel="change of log p of the right answer, nats")
    return _with_legend(figure, axes, 3)


def _position(found: Found) -> Figure:
    figure, axes = _figure(8.0, 4.0)
    for (task, own), colour in zip(found.items(), _colours(found), strict=True):
        rates = np.array([float(part["rate"]) if part["mentions"] else np.nan for part in own["bins"]])
        axes.plot(range(len(rates)), rates, "-o", color=colour, label=task)
        for at, part in enumerate(own["bins"]):
            if part["mentions"]:
                axes.annotate(f"{part['invented']}/{part['mentions']}", (at, rates[at]), xytext=(0, 7),
                              textcoords="offset points", ha="center", fontsize=8, color=INK)  # fmt: skip
    parts = len(next(iter(found.values()))["bins"])
    axes.set_xticks(range(parts), labels=[f"{100 * i // parts}–{100 * (i + 1) // parts} %" for i in range(parts)])
    axes.set(
        xlim=(-0.4, parts - 0.6),
        ylim=(-0.05, 1.12),
        xlabel="place in the answer",
        ylabel="share of mentions that are made up",
    )
    return _with_legend(figure, axes, 3)


def _yes(found: Found) -> Figure:
    rows = [(f"{task}: {name}", own) for task, table in found.items() for name, own in table.items()]
    figure, axes = _figure(8.0, 1.6 + 0.34 * len(rows))
    means = np.array([own["bias"] for _, own in rows])
    ends = np.array([[own["low"], own["high"]] for _, own in rows], dtype=float).T
    spread = np.nan_to_num(np.clip([means - ends[0], ends[1] - means], 0, None))
    axes.errorbar(means, range(len(rows)), xerr=spread, fmt="o", color=BLUE, capsize=4)
    axes.axvline(0, color=GREY, lw=1)
    axes.set_yticks(range(len(rows)), labels=[name for name, _ in rows])
    axes.set(
        ylim=(len(rows) - 0.5, -0.5),
        xlim=(-1.05, 1.05),
        xticks=np.linspace(-1, 1, 9),
        xlabel="share of yes said, less share of yes right",
    )
    return figure


def _letters(found: Found) -> Figure:
    figure = Figure(figsize=(1.2 + 3.4 * len(found), 3.4), layout="constrained", facecolor="white")
    grid = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (task, own) in zip(grid, found.items(), strict=True):
        names = list(own["letters"])
        at = np.arange(len(names))
        for offset, key, colour in ((-0.2, "said", BLUE), (0.2, "right", GREY)):
            axes.bar(at + offset, [own["letters"][name][key] for name in names], 0.38, color=colour, label=key)
        axes.set_xticks(at, labels=names)
        axes.set_title(f"{task}: recall spread {own['recall_std']:.2f}", fontsize=10)
        axes.set(ylabel="share of answers")
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


PICTURES: Mapping[str, Callable[[Found], Figure]] = {
    "ablation": _ablation,
    "dominance": _dominance,
    "sinks": _sinks,
    "heads": _heads,
    "exits": _exits,
    "position": _position,
    "yes": _yes,
    "letters": _letters,
}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.grid(color="#ECEDEF")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _with_legend(figure: Figure, axes: Axes, columns: int) -> Figure:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=columns, fontsize=9, frameon=False)
    return figure


def _whole_numbers(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _colours(found: Found) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(found))]
