"""Pictures of a run: curves, scores by family, a sheet of answers, attention maps.

Figures are made with matplotlib's objects and never through pyplot, so that nothing here touches a user's figures,
backend or settings. The colours are those of Okabe and Ito, which colour-blind readers can tell apart; right and
wrong differ by a mark and a line, too.
"""

from __future__ import annotations

import csv
import math
import textwrap
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmfuse.analysis.attention import AttentionExample
from mmfuse.data.samples import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK, SOFT = "#0072B2", "#D55E00", "#8A8F99", "#1D1F24", "#5B616E"
RIGHT, WRONG = "#00694C", "#B23A00"
RATES = (INK, "#CC79A7", "#56B4E9", "#E69F00")
DPI = 150


class Answered(Protocol):
    """What the sheet needs to know of an answer; `mmfuse.eval.Prediction` has it."""

    @property
    def key(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def prediction(self) -> str: ...
    @property
    def right(self) -> bool: ...


def plot_families(results: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Bars of exact match with its interval, blind and majority score, for all questions and for each family.

    Args:
        results: what `mmfuse.eval.score` gives.
        path: PNG or SVG.

    Raises:
        ValueError: there are no families.
    """
    if not results.get("by_family"):
        raise ValueError("there are no families to plot")
    rows: dict[str, Mapping[str, Any]] = {"all questions": results, **results["by_family"]}
    figure = _figure(8.0, 1.3 + 0.62 * len(rows))
    axes: Axes = figure.add_subplot()
    middle = np.arange(len(rows), dtype=float)
    accuracy = np.array([row["exact_match"] for row in rows.values()])
    low, high = np.array([row["interval"] for row in rows.values()]).T
    # Rounding may put the end of an interval a hair inside the bar.
    spread = np.clip([accuracy - low, high - accuracy], 0.0, None)
    axes.barh(middle - 0.17, accuracy, 0.34, color=BLUE, label="exact match, 95 % interval")
    axes.errorbar(accuracy, middle - 0.17, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    offset = 0.1
    for key, label, colour, hatch in (
        ("blind_exact_match", "blind: image replaced by its mean", GREY, ""),
        ("majority_exact_match", "most frequent answer", "#D9DBDF", "////"),
    ):
        known = [(at, row[key]) for at, row in zip(middle, rows.values(), strict=True) if row.get(key) is not None]
        if known:
            at, values = np.array(known).T
            axes.barh(at + offset, values, 0.17, color=colour, hatch=hatch, edgecolor="#A9ADB5", lw=0, label=label)
            offset += 0.17
    for at, row in zip(middle, rows.values(), strict=True):
        share = f"{100 * row['exact_match']:.1f} %"
        axes.text(1.02, at - 0.17, share, va="center", fontsize=11, fontweight="bold", color=INK)
        axes.text(1.02, at + 0.2, f"n = {row['n']}", va="center", fontsize=9, color=SOFT)
    axes.axhline(0.55, color="#C9CCD2", lw=0.8)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.55))
    axes.set_yticks(middle, labels=list(rows), fontsize=11)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_xticks(np.linspace(0, 1, 6), labels=[f"{p} %" for p in range(0, 101, 20)], fontsize=10)
    axes.grid(axis="x", color="#ECEDEF")
    _open_frame(axes)
    figure.legend(loc="outside upper center", ncols=3, fontsize=10, frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_predictions(
    samples: Sequence[Sample],
    predictions: Sequence[Answered],
    path: str | PathLike[str],
    *,
    blind: Sequence[Answered] | None = None,
    columns: int = 4,
) -> None:
    """A sheet of answers: the image, the question, what was expected and what was answered.

    Args:
        samples: the first image of each is shown, as it is and without smoothing.
        predictions: for these samples, in this order.
        path: PNG or SVG.
        blind: answers without the image, in grey.
        columns: samples side by side.

    Raises:
        ValueError: no samples, or predictions of other samples.
    """
    for name, given in (("predictions", predictions), ("blind predictions", blind or [])):
        if given and [sample.key for sample in samples] != [item.key for item in given]:
            raise ValueError(f"the {name} are not those of the {len(samples)} samples, in their order")
    if not samples or not predictions:
        raise ValueError("a sheet needs at least one sample with its prediction")
    cells = [_cell(prediction, blind[number] if blind else None) for number, prediction in enumerate(predictions)]
    columns = min(columns, len(cells))
    lines = max(map(len, cells))
    width, side, line, gap = 2.35, 1.75, 0.175, 0.22
    height = side + lines * line + 2 * gap
    rows = -(-len(cells) // columns)
    total = (columns * width + gap, rows * height + gap)
    figure = _figure(*total, layout=None)
    for number, (sample, item, cell) in enumerate(zip(samples, predictions, cells, strict=True)):
        left, top = gap + number % columns * width, total[1] - gap - number // columns * height
        box = (left / total[0], (top - side) / total[1], side / total[0], side / total[1])
        axes = figure.add_axes(box)
        axes.set_anchor("SW")
        if sample.pictures:
            _show(axes, sample.pictures[0])
        else:
            axes.set(xticks=[], yticks=[], facecolor="#F4F4F2")
            axes.text(0.5, 0.5, "no image", ha="center", va="center", color=SOFT, transform=axes.transAxes)
        for spine in axes.spines.values():
            spine.set(color=RIGHT if item.right else WRONG, linewidth=2.5, linestyle="-" if item.right else (0, (3, 2)))
        for row, (text, style) in enumerate(cell):
            y = (top - side - 0.12 - (row + 0.5) * line) / total[1]
            figure.text(left / total[0], y, text, va="center", parse_math=False, **style)
    figure.savefig(path, dpi=DPI)


def plot_attention(
    examples: Sequence[AttentionExample], path: str | PathLike[str], *, max_layers: int = 6, max_tokens: int = 4
) -> None:
    """For each question the image, and for each layer what the row that predicts an answer token attends to in it.

    All maps share one colour scale. The number below a map is the attention that goes to the whole image; on grids of
    up to 4 × 4 each cell shows its share.

    Args:
        examples: see `attention_examples`.
        path: PNG or SVG.
        max_layers: of more, as many are shown at equal distances.
        max_tokens: of longer answers the first so many tokens are shown; blanks are left out.

    Raises:
        ValueError: no examples, or only answers without a visible token.
    """
    rows = [
        (example, token)
        for example in examples
        for token in [t for t, text in enumerate(example.tokens) if text.strip()][:max_tokens]
    ]
    if not rows:
        raise ValueError("there are no answer tokens whose attention could be plotted")
    count = min(max_layers, min(len(example.layers) for example in examples))
    side = 1.35
    figure = _figure(2.2 + (count + 1) * side + 0.7, 0.9 + len(rows) * (side + 0.22))
    panels = figure.subplots(
        len(rows), count + 2, squeeze=False, gridspec_kw={"width_ratios": [1.35] + [1.0] * (count + 1)}
    )
    strongest = max(float(example.maps[:, token].max()) for example, token in rows)
    drawn = None
    for line, (example, token) in enumerate(rows):
        _describe(panels[line, 0], example, token, repeated=line > 0 and rows[line - 1][0] is example)
        _show(panels[line, 1], example.image)
        for column, layer in enumerate(np.linspace(0, len(example.layers) - 1, count).round().astype(int)):
            axes = panels[line, column + 2]
            drawn = _overlay(axes, example, example.maps[layer, token].numpy(), strongest)
            if line == 0:
                axes.set_title(f"layer {example.layers[layer]}", fontsize=10)
    panels[0, 1].set_title("image", fontsize=10)
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=panels[:, 2:], fraction=0.03, pad=0.02, aspect=30)
    bar.set_label("attention to a visual token,\nmean over heads", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    figure.savefig(path, dpi=DPI)


def plot_losses(
    metrics_csv: str | PathLike[str], path: str | PathLike[str], stages: Sequence[tuple[str, int]] | None = None
) -> None:
    """Curves over the steps of a run: loss in training and validation, exact match, and the learning rate.

    Args:
        metrics_csv: with a column `step` and any of `train/loss`, `val/loss`, `val/exact_match`, `lr` (or several
            columns that begin so), blank where a step has no such value. Of a repeated step the last row counts.
        path: PNG or SVG.
        stages: name and first step of each stage of training.

    Raises:
        ValueError: the file has no column `step`, or none of the losses.
    """
    metrics = read_metrics(metrics_csv)
    losses = [name for name in ("train/loss", "val/loss") if name in metrics]
    scores = [name for name in ("val/exact_match", "val/blind_exact_match") if name in metrics]
    rates = [name for name in metrics if name.startswith("lr")]
    if not losses:
        raise ValueError(f"{metrics_csv}: neither train/loss nor val/loss holds a value, so there are no curves")
    heights = [2.9, *([1.7] if scores else []), *([1.1] if rates else [])]
    figure = _figure(8.0, sum(heights) + 0.5)
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    panels = list(grid[:, 0])
    _draw_losses(panels[0], metrics, [start for _, start in stages or ()])
    if scores:
        for name, colour in zip(scores, (ORANGE, GREY), strict=False):
            label = name.removeprefix("val/").replace("_", " ")
            panels[1].plot(*metrics[name], "o-", color=colour, ms=4, lw=1.6, label=label)
        panels[1].set(ylim=(-0.03, 1.03), ylabel="validation")
        panels[1].set_yticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
        panels[1].legend(fontsize=9, frameon=False, loc="lower right")
    if rates:
        for number, rate in enumerate(rates):
            # Parts may share a rate; the later ones are thinner and broken, so that all of them can be seen.
            style = {
                "color": RATES[number % len(RATES)],
                "lw": max(1.0, 2.6 - 0.6 * number),
                "ls": "--" if number else "-",
            }
            panels[-1].plot(*metrics[rate], label=rate.removeprefix("lr").strip("/-") or None, **style)
        top = max(value for rate in rates for value in metrics[rate][1])
        # Room for the legend above the curves.
        panels[-1].set(ylim=(0, (1.6 if len(rates) > 1 else 1.1) * top or None), ylabel="learning rate")
        panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        if len(rates) > 1:
            panels[-1].legend(fontsize=8, frameon=False, ncols=len(rates), loc="upper right")
    for axes in panels:
        axes.grid(color="#ECEDEF")
        axes.margins(x=0.01)
        _open_frame(axes)
    panels[-1].set_xlabel("step")
    _mark_stages(panels, stages or ())
    figure.align_ylabels()
    figure.savefig(path, dpi=DPI)


def read_metrics(metrics_csv: str | PathLike[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every column that holds a finite number, in order of the steps.

    Raises:
        ValueError: there is no column `step`.
    """
    held: dict[str, dict[int, float]] = {}
    with open(metrics_csv, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"{metrics_csv}: there is no column 'step'; there are {reader.fieldnames}")
        for row in reader:
            for name, text in row.items():
                value = _number(text)
                if name != "step" and math.isfinite(value):
                    held.setdefault(name, {})[int(float(row["step"]))] = value
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in held.items()}


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Mean over up to `span` neighbours on either side: a running mean would lag behind a falling curve."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    # The window shrinks on both sides alike towards the ends, where it would else be lopsided.
    reach = np.minimum(span, np.minimum(at, len(values) - 1 - at))
    return list((total[at + reach + 1] - total[at - reach]) / (2 * reach + 1))


def _draw_losses(axes: Axes, metrics: Mapping[str, tuple[list[int], list[float]]], starts: Sequence[int]) -> None:
    if "train/loss" in metrics:
        steps, values = metrics["train/loss"]
        axes.plot(steps, values, color=BLUE, lw=0.7, alpha=0.28, label="training")
        # Stages train on other data: an average across their boundary would show a slope that is not there.
        cuts = [0, *(i for i in (bisect_left(steps, start) for start in starts) if 0 < i < len(steps)), len(steps)]
        span = max(1, len(steps) // 60)
        means = [smooth(values[begin:end], span) for begin, end in pairwise(cuts)]
        for number, ((begin, end), mean) in enumerate(zip(pairwise(cuts), means, strict=True)):
            label = None if number else "training, smoothed"
            axes.plot(steps[begin:end], mean, "o-" if len(mean) == 1 else "-", color=BLUE, ms=4.5, lw=1.8, label=label)
    if "val/loss" in metrics:
        axes.plot(*metrics["val/loss"], "o-", color=ORANGE, ms=4.5, lw=1.4, label="validation")
    every = [value for name in ("train/loss", "val/loss") if name in metrics for value in metrics[name][1]]
    if min(every) > 0 and max(every) > 30 * min(every):
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.legend(fontsize=9, frameon=False, loc="upper right")


def _mark_stages(panels: Sequence[Axes], stages: Sequence[tuple[str, int]]) -> None:
    """A line where a stage begins, and its name above the first panel; names that would touch go one line up."""
    low, high = panels[0].get_xlim()
    ends = [-math.inf, -math.inf]
    for number, (name, start) in enumerate(stages):
        if start > high:  # the run was stopped before
            continue
        if number:
            for axes in panels:
                axes.axvline(start, color=SOFT, lw=1.0, ls=(0, (4, 3)))
        place = (max(start, low) - low) / (high - low)
        level = 0 if place > ends[0] else 1
        ends[level] = place + 0.012 * len(name) + 0.02
        panels[0].annotate(
            name, (place, 1.0), xycoords="axes fraction", xytext=(3, 4 + 13 * level), textcoords="offset points",
            fontsize=10, color=INK, parse_math=False,
        )  # fmt: skip


def _cell(item: Answered, blind: Answered | None) -> list[tuple[str, dict[str, Any]]]:
    """The lines below an image: text and style."""
    mark, colour = ("✓", RIGHT) if item.right else ("✗", WRONG)
    lines = [(text, {"fontsize": 9.5, "color": INK}) for text in _wrap(item.question, 29)]
    lines += [(text, {"fontsize": 9.5, "color": SOFT}) for text in _wrap(f"expected: {item.answer}", 29)]
    told = {"fontsize": 9.5, "color": colour, "fontweight": "bold"}
    lines += [(text, told) for text in _wrap(f"{mark} {item.prediction or '(nothing)'}", 25)]
    if blind is not None:
        lines += [
            (text, {"fontsize": 9, "color": GREY}) for text in _wrap(f"blind: {blind.prediction or '(nothing)'}", 29)
        ]
    return lines


def _describe(axes: Axes, example: AttentionExample, token: int, *, repeated: bool) -> None:
    """The text in front of a row of maps: the question, once, and the token."""
    axes.axis("off")
    question = "" if repeated else "\n".join(_wrap(example.question, 24, lines=4))
    axes.text(0, 0.97, question, va="top", fontsize=9.5, color=INK, transform=axes.transAxes, parse_math=False)
    answer = f"“{example.tokens[token].strip()}”"
    axes.text(0, 0.05, answer, fontsize=13, fontweight="bold", color=BLUE, transform=axes.transAxes, parse_math=False)


def _show(axes: Axes, image: Any) -> None:
    """An image as it is: greyscale or colour, unsmoothed."""
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") and image.mode not in ("L", "RGB") else image)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _overlay(axes: Axes, example: AttentionExample, attention: NDArray[np.float32], strongest: float) -> Any:
    """A map over the image in grey; returns the map for a colour bar."""
    from matplotlib.patheffects import withStroke

    image = example.image
    grey = np.asarray(image.convert("L") if hasattr(image, "convert") else image)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    height, width = grey.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    drawn = axes.imshow(
        attention, cmap="viridis", vmin=0.0, vmax=strongest, alpha=0.65, extent=extent, interpolation="nearest"
    )
    if attention.size <= 16:
        rows, cols = attention.shape
        for (y, x), share in np.ndenumerate(attention):
            place = ((x + 0.5) * width / cols - 0.5, (y + 0.5) * height / rows - 0.5)
            text = axes.text(*place, f"{100 * share:.0f}", fontsize=8.5, ha="center", va="center", color="white")
            text.set_path_effects([withStroke(linewidth=2, foreground="#000000C0")])
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"{100 * float(attention.sum()):.0f} % on the image", fontsize=8.5, color=SOFT, labelpad=2)
    return drawn


def _wrap(text: str, width: int, lines: int = 2) -> list[str]:
    """At most `lines` lines of at most `width` characters."""
    # Control characters have no glyph; what a random model says may hold any.
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return textwrap.wrap(clean, width, max_lines=lines, placeholder=" …") or [""]


def _open_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, facecolor="white")  # type: ignore[arg-type]
