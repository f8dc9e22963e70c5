"""What a data set consists of: modalities, lengths, sizes of images, in numbers and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfuse.data.decoders import picture_header
from mmfuse.data.samples import Sample
from mmfuse.data.sources import Source
from mmfuse.data.sources.undecoded import Undecoded
from mmfuse.models.media import MEDIA


@dataclass
class Statistics:
    """Columns of numbers about samples.

    Attributes:
        modalities: how many samples have which combination, such as `text + image`.
        columns: by what is measured, a number for each sample or each image.
    """

    modalities: Counter[str] = field(default_factory=Counter)
    columns: dict[str, list[float]] = field(default_factory=dict)

    def add(self, column: str, value: float) -> None:
        """Append one value."""
        self.columns.setdefault(column, []).append(value)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return count, mean and quantiles of each column."""
        found = {}
        for name, values in self.columns.items():
            low, median, high, top = np.quantile(values, [0.05, 0.5, 0.95, 1.0]).tolist()
            mean = float(np.mean(values))
            found[name] = {"count": len(values), "mean": mean, "5%": low, "median": median, "95%": high, "max": top}
        return found


def statistics(source: Source, measure: Callable[[Sample], int], unit: str, limit: int | None = None) -> Statistics:
    """Go through the samples of `source`; images are opened for their size, and not decoded.

    Args:
        source: what is measured.
        measure: length of a sample.
        unit: of that length.
        limit: only so many samples, evenly spread.

    Raises:
        DataError: a sample that cannot be read; see `lint` for all of them.
    """
    found = Statistics()
    count = len(source) if limit is None else min(limit, len(source))
    for number in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
        sample = source.read(number)
        present = [name for name, items in sample.media.items() if items]
        found.modalities[" + ".join(["text", *present])] += 1
        found.add(f"length ({unit})", measure(sample))
        found.add("messages", len(sample.messages or ()) or 1)
        for name, items in sample.media.items():
            if items or name == "image":
                found.add(f"{MEDIA[name].plural} per sample", len(items))
            for item in items:
                assert isinstance(item, Undecoded)
                data = item.read()
                found.add(f"{name} (KiB)", len(data) / 1024)
                if not item.is_features:
                    width, height = picture_header(data, item.where).size
                    found.add("image width (px)", width)
                    found.add("image height (px)", height)
    return found


def text_histogram(values: Sequence[float], bins: int = 10, width: int = 40) -> list[str]:
    """Lines of a histogram for a terminal: range, count and bar."""
    if not values:
        return []
    counts, edges = np.histogram(values, bins=min(bins, len(set(values))))
    top = max(counts)
    return [
        f"{low:>9.0f} – {high:<9.0f} {count:>8}  {'█' * round(width * count / top)}"
        for low, high, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    ]


def plot(found: Statistics, title: str, path: Path) -> None:
    """Write a histogram of every column into one PNG."""
    from matplotlib.figure import Figure

    names = [name for name in found.columns if len(set(found.columns[name])) > 1] or list(found.columns)[:1]
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(4.2 * across, 3.0 * down), layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False)
    for number, name in enumerate(names):
        axis = axes[number // across][number % across]
        axis.hist(found.columns[name], bins=_bins(found.columns[name]), color="#4477aa")
        axis.axvline(float(np.median(found.columns[name])), color="#cc3311", linewidth=1.2, label="median")
        axis.set_xlabel(name)
        axis.set_ylabel("images" if "px" in name or "KiB" in name else "samples")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for number in range(len(names), down * across):
        axes[number // across][number % across].set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _bins(values: Sequence[float]) -> Any:
    """A bar for each number, where they are few whole ones."""
    low, high = min(values), max(values)
    few = high - low < 20 and all(value == int(value) for value in values)
    return np.arange(low - 0.5, high + 1.5) if few else 40
