"""Referring expressions: is the box that was said the box that was meant? RefCOCO, RefCOCO+ and RefCOCOg."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmfuse.errors import DataError
from mmfuse.eval.scorers.records import (
    Result,
    Row,
    Sample,
    by_category,
    clusters,
    identity,
    mean,
    optional,
    text,
    unparsed,
)

Box = tuple[float, float, float, float]

#: From which overlap on a box is right.
THRESHOLD = 0.5
#: Which number stands for the full width or height, by the name of a convention; None: pixels.
CONVENTIONS = {"pixels": None, "unit": 1.0, "0-999": 999.0, "0-1000": 1000.0}

_QWEN = re.compile(r"\((.*?)\),\((.*?)\)")
_INTERNVL = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BRACKETS = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")
_FOUR = re.compile(rf"{_NUMBER}\D+?{_NUMBER}\D+?{_NUMBER}\D+?{_NUMBER}")
_NOWHERE: Box = (0.0, 0.0, 0.0, 0.0)


def refcoco(rows: Sequence[Row], protocol: str) -> Result:
    """The share of boxes that overlap the right one by half (intersection over union), and the mean overlap.

    `target` is `[x1, y1, x2, y2]` in pixels; `width` and `height` are those of the image. How a box is written is a
    property of the model, so it is asked for and never guessed: by the field `convention` of each row (`pixels`,
    `unit`, `0-999`, `0-1000`; the first four numbers count, as corners) under the protocol `convention`; or by a
    model's own evaluation: `qwen_vl` reads `(x1,y1),(x2,y2)` of 0-999, `internvl` reads `[x1,y1,x2,y2]` and divides by
    1000 if the four add up to 4 or more, `lmms` reads `[x1, y1, x2, y2]` of 0-1. The first box counts. An answer
    without one has no overlap.
    """
    samples, overlaps = [], []
    for row in rows:
        width, height = (_size(row, key) for key in ("width", "height"))
        found = _box(row, protocol)
        box = found or _NOWHERE
        scale = _scale(row, protocol, box)
        placed = box if scale is None else _placed(box, scale, width, height)
        overlap = iou(placed, _target(row))
        overlaps.append(overlap if overlap == overlap else 0.0)
        parsed = None if found is None else " ".join(f"{side:g}" for side in placed)
        category = optional(row, "split", "category")
        cluster = clusters(row, "image", "image_id")
        samples.append(Sample(identity(row), float(overlap >= THRESHOLD), parsed, protocol, cluster, category))
    metrics = {
        "accuracy": mean(sample.score for sample in samples),
        "mean_iou": mean(overlaps),
        **by_category("accuracy", samples),
        "unparsed_rate": unparsed(samples),
    }
    return Result(tuple(samples), metrics)


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes of corners, in single precision as the public evaluations compute it.

    NaN if both are empty.
    """
    a, b = np.array(first, dtype=np.float32), np.array(second, dtype=np.float32)
    with np.errstate(all="ignore"):
        sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
        inside = sides[0] * sides[1]
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        return float(inside / (areas[0] + areas[1] - inside))


def _box(row: Row, protocol: str) -> Box | None:
    given = text(row)
    if protocol == "qwen_vl":
        match = _QWEN.search(given)
        parts = [part for corner in match.groups() for part in corner.split(",")] if match else []
        if match and not all(corner.count(",") == 1 for corner in match.groups()):
            return None
    else:
        match = {"internvl": _INTERNVL, "lmms": _BRACKETS}.get(protocol, _FOUR).search(given)
        parts = list(match.groups()) if match else []
    try:
        x1, y1, x2, y2 = (float(part) for part in parts)
    except ValueError:
        return None
    return x1, y1, x2, y2


def _scale(row: Row, protocol: str, box: Box) -> float | None:
    if protocol == "convention":
        name = optional(row, "convention")
        if name not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise DataError(f"row {identity(row)}: 'convention' must be one of {known}, got {name!r}")
        return CONVENTIONS[name]
    if protocol == "internvl":
        return 1000.0 if np.array(box, dtype=np.float32).sum() >= 4 else 1.0
    return {"qwen_vl": 999.0, "lmms": 1.0}[protocol]


def _placed(box: Box, scale: float, width: float, height: float) -> Box:
    sides = np.array(box, dtype=np.float32) / np.float32(scale) * np.array([width, height] * 2, dtype=np.float32)
    x1, y1, x2, y2 = (float(side) for side in sides)
    return x1, y1, x2, y2


def _size(row: Row, key: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise DataError(f"row {identity(row)}: {key!r} must be the image's size in pixels, got {value!r:.80}")
    return float(value)


def _target(row: Row) -> Box:
    value = row.get("target")
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise DataError(f"row {identity(row)}: 'target' must be [x1, y1, x2, y2] in pixels, got {value!r:.80}")
    x1, y1, x2, y2 = (float(side) for side in value)
    if not (x1 < x2 and y1 < y2):
        raise DataError(f"row {identity(row)}: 'target' must be corners with x1 < x2 and y1 < y2, got {value!r:.80}")
    return x1, y1, x2, y2
