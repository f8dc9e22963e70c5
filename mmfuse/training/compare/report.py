"""What a comparison leaves: the table in the terminal and as markdown, `compare.json`, and two pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from mmfuse.analysis.comparison_plots import Point, plot_quality, plot_quality_against_flops
from mmfuse.eval.intervals import Estimate
from mmfuse.eval.report import PERCENT, percent, percent_range
from mmfuse.eval.results import provenance, write_text_atomically
from mmfuse.training.compare.summary import Row, Scores

JSON, MARKDOWN = "compare.json", "compare.md"
QUALITY, AGAINST_FLOPS = "quality.png", "quality-flops.png"
NONE = "–"

_THOUSANDS = ("", "k", "M", "G", "T", "P", "E")


class Column(NamedTuple):
    """A column of the table; a cell may have a second line."""

    title: str
    cell: Callable[[Scores], tuple[str, str]]


COLUMNS = (
    Column("exact match", lambda own: (percent(own.exact_match.mean), _range(own.exact_match))),
    Column("blind", lambda own: (percent(own.blind_exact_match), "")),
    Column("train tokens/s", lambda own: (short(own.tokens_per_second), "")),
    Column("params", lambda own: (short(own.parameters), "")),
    Column("train FLOPs/sample", lambda own: (short(own.cost.train_flops_per_sample), "")),
    Column("prefill", lambda own: (milliseconds(own.cost.generation.prefill_seconds), "")),
    Column("decode/token", lambda own: (milliseconds(own.cost.generation.decode_seconds_per_token), "")),
    Column("KV/sample", lambda own: (f"{short(own.cost.generation.kv_bytes_per_sample)}B", "")),
)


def write_comparison(out: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write `compare.json`, `compare.md` and the pictures into `out`.

    Args:
        out: the folder of the comparison.
        rows: one for each strategy.
        about: what was compared: config, seeds, budget; goes into `compare.json`.
    """
    points = [_point(row, row.scores) for row in rows if row.scores is not None]
    pictures = []
    if points:
        plot_quality(points, out / QUALITY)
        plot_quality_against_flops(points, out / AGAINST_FLOPS)
        pictures = [f"![Exact match by strategy]({QUALITY})", f"![Exact match against FLOPs]({AGAINST_FLOPS})"]
    held = {**about, **provenance(), "strategies": [asdict(row) for row in rows]}
    write_text_atomically(out / JSON, json.dumps(held, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    parts = [markdown_table(rows), "\n".join(notes(rows)), *pictures]
    write_text_atomically(out / MARKDOWN, "\n\n".join(parts) + "\n")


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """The titles of the columns, and for each row its cells, of up to two lines each."""
    budgeted = any(row.factor != 1 for row in rows)
    first = rows[0].label
    titles = ["fusion", COLUMNS[0].title, f"against {first}", *(column.title for column in COLUMNS[1:])]
    table = []
    for row in rows:
        failed = f"{len(row.failed)} of {len(row.failed) + len(row.seeds)} runs failed" if row.failed else ""
        name = (row.label, failed)
        if row.scores is None:
            table.append([name, ("failed", ""), *[(NONE, "")] * len(COLUMNS)])
        else:
            own = [column.cell(row.scores) for column in COLUMNS]
            table.append([name, own[0], _difference(row.scores.difference), *own[1:]])
        if budgeted:
            table[-1].append((f"{row.steps:,}", f"× {row.factor:.3g}"))
    return [*titles, *(["steps"] if budgeted else [])], table


def terminal_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal."""
    titles, table = cells(rows)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(titles):
        shown.add_column(re.sub(r" |(?=/sample|/token$)", "\n", name), justify="right" if number else "left")
    for row in table:
        shown.add_row(*("\n".join(filter(None, cell)) for cell in row))
    return shown


def markdown_table(rows: Sequence[Row]) -> str:
    """The table as markdown."""
    titles, table = cells(rows)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [[f"{first} ({second})" if second else first for first, second in row] for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know about the intervals."""
    counts = [(row.scores.exact_match.seeds, row.scores.exact_match.questions) for row in rows if row.scores]
    if not counts:
        return ["Every run failed."]
    fewest = min(seeds for seeds, _ in counts)
    kind = "over seeds and questions" if fewest > 1 else "over questions alone: one seed says nothing about others"
    said = [f"95{PERCENT} intervals {kind}. {counts[0][1]:,} questions, {fewest} or more seeds for each strategy."]
    if any(row.scores and row.scores.difference for row in rows):
        said.append(f"Differences to {rows[0].label} are paired by seed and question.")
    return said


def short(number: float) -> str:
    """A number with three digits and a prefix: `12345` is `"12.3 k"`."""
    place = 0
    while abs(number) >= 999.5 and place < len(_THOUSANDS) - 1:
        number, place = number / 1000, place + 1
    digits = 0 if place == 0 and float(number).is_integer() else max(0, 2 - len(str(int(abs(number)))) + 1)
    return f"{number:.{digits}f}\u202f{_THOUSANDS[place]}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with three digits."""
    value = 1000 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}\u202fms"


def _range(estimate: Estimate) -> str:
    return percent_range((estimate.low, estimate.high))


def _difference(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return NONE, ""
    points = (100 * estimate.low, 100 * estimate.high)
    return f"{100 * estimate.mean:+.1f}\u202fpp", f"{points[0]:+.1f} to {points[1]:+.1f}"


def _point(row: Row, scores: Scores) -> Point:
    match = scores.exact_match
    return Point(
        label=row.label,
        mean=match.mean,
        low=match.low,
        high=match.high,
        by_seed=scores.by_seed,
        blind=scores.blind_exact_match,
        flops=scores.cost.train_flops_per_sample,
    )
