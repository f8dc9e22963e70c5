"""Exact match after `normalise`: the scorer of tasks that have no convention of their own."""

from __future__ import annotations

from collections.abc import Sequence

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
    texts,
)
from mmfuse.eval.text import normalise


def exact_match(rows: Sequence[Row], protocol: str) -> Result:
    """Whether the prediction equals the target, or one of several, up to case and whitespace."""
    samples = []
    for row in rows:
        given = normalise(text(row))
        right = given in {normalise(target) for target in texts(row)}
        samples.append(
            Sample(identity(row), float(right), given, "text", clusters(row, "image"), optional(row, "category"))
        )
    metrics = {"exact_match": mean(sample.score for sample in samples), **by_category("exact_match", samples)}
    return Result(tuple(samples), metrics)
