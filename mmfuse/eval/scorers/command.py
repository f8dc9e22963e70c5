"""`mmfuse score`: score a file of predictions by the rules of a task and a protocol. It needs no model and no GPU."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfuse.errors import DataError
from mmfuse.eval.scorers.records import Result
from mmfuse.eval.scorers.table import PROTOCOLS, SCORERS, TaskScorer, find_scorer, score_rows


def main(argv: Sequence[str]) -> int | None:
    """Run `mmfuse score` with the words of the command line, its own name first."""
    asked = _parser().parse_args(list(argv)[1:])
    if asked.tasks:
        print(_table())
        return None
    if asked.file is None or asked.task is None:
        _parser().error("a file of predictions and --task are needed; --tasks lists the tasks")
    task = find_scorer(asked.task)
    protocol = asked.protocol or task.protocols[0]
    result = score_rows(task.name, read_rows(asked.file), protocol)
    if asked.samples is not None:
        _write_samples(asked.samples, result)
    for warning in result.warnings:
        print(f"mmfuse: warning: {warning}", file=sys.stderr)
    print(json.dumps(finite(result.values)) if asked.json else _lines(task, protocol, result))
    return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; blank lines do not count.

    Raises:
        DataError: a line is no JSON object, with the file and the number of the line.
        FileNotFoundError: there is no such file.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number}: expected an object {{"id", "prediction", "target"}}')
        rows.append(row)
    return rows


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Numbers as JSON can hold them: what is not defined becomes None."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mmfuse score", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", nargs="?", type=Path, help='lines {"id", "prediction", "target"} plus task fields')
    parser.add_argument("--task", help="the task whose rules apply, such as pope")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="whose rules; the task's first one if not given")
    parser.add_argument("--json", action="store_true", help="print {metric: value} and nothing else")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write what was parsed of each row, as JSONL")
    parser.add_argument("--tasks", action="store_true", help="list the tasks with their protocols and fields")
    return parser


def _lines(task: TaskScorer, protocol: str, result: Result) -> str:
    values = result.values
    width = max(map(len, values))
    lines = [f"{task.name}, protocol {protocol}, {len(result.samples)} samples"]
    lines += [f"  {name:<{width}}  {value:.4f}" for name, value in values.items()]
    return "\n".join(lines)


def _table() -> str:
    width = max(map(len, SCORERS))
    return "\n".join(
        f"{name:<{width}}  {entry.primary:<14}  {', '.join(entry.protocols):<26}  {', '.join(entry.fields) or '-'}"
        for name, entry in SCORERS.items()
    )


def _write_samples(path: Path, result: Result) -> None:
    with path.open("w", encoding="utf-8") as file:
        for sample in result.samples:
            file.write(json.dumps(vars(sample), ensure_ascii=False) + "\n")
