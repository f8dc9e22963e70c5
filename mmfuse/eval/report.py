"""`report.html`: a run on one page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from mmfuse.errors import unknown
from mmfuse.eval.questions import Prediction
from mmfuse.eval.results import write_text_atomically

TEMPLATE = Path(__file__).with_name("report.html.j2")
FILE_NAME = "report.html"
PERCENT = "\u202f%"  # a narrow space that never breaks

_MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}

#: What `provenance` says, and what it is called on the page.
_ORIGIN = {
    "mmfuse_version": "mmfuse",
    "torch_version": "torch",
    "transformers_version": "transformers",
    "lightning_version": "Lightning",
    "python_version": "Python",
    "platform": "platform",
    "cpu_count": "CPUs",
    "torch_threads": "torch threads",
    "accelerator": "accelerator",
    "git_commit": "git commit",
}

#: Entries with a place of their own on the page; the others are listed under "all results".
_SHOWN = {
    "n",
    "exact_match",
    "interval",
    "blind_exact_match",
    "majority_exact_match",
    "per_digit",
    "by_family",
    "git_dirty",
    *_ORIGIN,
}


@dataclass(frozen=True)
class Picture:
    """A picture of the report: curves, predictions, attention, the mask.

    Attributes:
        title: its heading.
        caption: what it shows and how to read it.
        path: a PNG, SVG or JPEG file.
    """

    title: str
    caption: str
    path: str | PathLike[str]


def write_report(
    folder: str | PathLike[str],
    *,
    title: str,
    results: Mapping[str, Any],
    config_text: str,
    pictures: Sequence[Picture] = (),
    predictions: Sequence[Prediction] = (),
    blind: Sequence[Prediction] | None = None,
    per_family: int = 6,
) -> Path:
    """Write `report.html` into `folder`.

    Args:
        folder: made if there is none.
        title: of the page.
        results: what `score` and `provenance` gave and anything else that `results.json` holds; what is missing is
            left out of the page.
        config_text: the resolved config, shown as it is.
        pictures: embedded in this order.
        predictions: from which the table shows `per_family` of each family, wrong ones first.
        blind: the blind predictions for the same questions, in the same order.
        per_family: rows of each family.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: a picture is not there.
        ValueError: a picture of another kind, or more or fewer blind predictions.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    environment.filters["range"] = percent_range
    environment.filters["plain"] = _plain
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        results=results,
        headlines=_headlines(results),
        families=results.get("by_family") or {},
        pictures=[(picture, _embedded(Path(picture.path))) for picture in pictures],
        rows=_rows(predictions, blind, per_family),
        asked=len(predictions),
        blind=blind is not None,
        config_text=config_text,
        origin=[(label, results[key]) for key, label in _ORIGIN.items() if results.get(key) is not None],
        others={key: value for key, value in results.items() if key not in _SHOWN and value is not None},
    )
    return write_text_atomically(Path(folder) / FILE_NAME, text + "\n")


def percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent, a dash if there is none: `0.9312` is `"93.1 %"`.

    Shares close to the ends keep away from them: only all of them is 100 %, and only none is 0 %.
    """
    if share is None:
        return "–"
    step = 10.0**-digits
    value = 100 * share
    if 0 < share < 1:
        value = min(max(value, step), 100 - step)
    return f"{value:.{digits}f}{PERCENT}"


def percent_range(interval: Sequence[float]) -> str:
    """An interval as per cent: `[0.912, 0.951]` is `"91.2–95.1 %"`."""
    low, high = map(percent, interval)
    return f"{low.removesuffix(PERCENT)}–{high}"


def _headlines(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(value, label, note) of the numbers at the top."""
    found: list[tuple[str, str, str]] = []
    if results.get("exact_match") is not None:
        interval = results.get("interval")
        note = f"95\u202f% interval {percent_range(interval)}" if interval else ""
        found.append((percent(results["exact_match"]), "exact match", note))
    for key, label, note in (
        ("blind_exact_match", "blind", "the same model, images replaced by their mean"),
        ("majority_exact_match", "majority", "always the most frequent answer of the family"),
        ("per_digit", "digits read", "single digits of transcriptions"),
    ):
        if results.get(key) is not None:
            found.append((percent(results[key]), label, note))
    if results.get("n") is not None:
        found.append((f"{results['n']:,}".replace(",", "\u202f"), "questions", ""))
    return found


def _rows(
    predictions: Sequence[Prediction], blind: Sequence[Prediction] | None, per_family: int
) -> list[tuple[Prediction, str | None]]:
    """(prediction, blind answer) of some predictions of each family, wrong ones first."""
    if blind is not None and len(blind) != len(predictions):
        raise ValueError(f"{len(blind)} blind predictions for {len(predictions)} questions")
    families: dict[str, list[tuple[Prediction, str | None]]] = {}
    for row, item in enumerate(predictions):
        unseen = blind[row].prediction if blind is not None else None
        families.setdefault(item.family, []).append((item, unseen))
    # Half of the rows at most are wrong, so that the page also shows what right answers look like.
    chosen = []
    for held in families.values():
        wrong, right = [row for row in held if not row[0].right], [row for row in held if row[0].right]
        share = max(per_family - len(right), (per_family + 1) // 2)
        kept = wrong[:share]
        chosen += kept + right[: per_family - len(kept)]
    return chosen


def _embedded(path: Path) -> str:
    kind = _MEDIA_TYPES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: {unknown('picture format', path.suffix, _MEDIA_TYPES)}")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _plain(value: Any) -> str:
    """A value of `results.json` for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}".replace(",", "\u202f")
    if isinstance(value, int) and abs(value) >= 1e4:
        return f"{value:,}".replace(",", "\u202f")
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)
