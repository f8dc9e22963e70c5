"""`mmfuse score`: score a file of predictions by the rules of a task and a protocol. It needs no model and no GPU."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.scorers.judges import requests, with_judgements
from mmfuse.eval.scorers.records import Result
from mmfuse.eval.scorers.table import PROTOCOLS, SCORERS, find_scorer, score_rows
from mmfuse.eval.scorers.task import Judge, TaskScorer


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
    rows, resources = read_rows(asked.file), read_resources(asked.resource)
    if asked.export_requests is not None:
        _export(asked.export_requests, task, rows, resources)
        return None
    if asked.judgements is not None:
        if protocol not in _judge(task).protocols:
            known = " or ".join(_judge(task).protocols)
            raise ConfigError(f"task {task.name}, protocol {protocol} reads no judgements: use --protocol {known}")
        rows = with_judgements(rows, read_rows(asked.judgements), _judge(task).field)
    result = score_rows(task.name, rows, protocol, resources)
    if asked.samples is not None:
        _write_samples(asked.samples, result)
    for warning in result.warnings:
        print(f"mmfuse: warning: {warning}", file=sys.stderr)
    print(json.dumps(finite(result.values)) if asked.json else _lines(task, protocol, result))
    return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; blank lines do not count.

    Raises:
        DataError: the file is no UTF-8 text, or a line no JSON object, with the file and the number of the line.
        FileNotFoundError: there is no such file.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
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


def read_resources(words: Sequence[str]) -> dict[str, str]:
    """The texts of files given as `NAME=FILE`.

    Raises:
        ConfigError: a word without `=`.
        FileNotFoundError: there is no such file.
    """
    resources = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            raise ConfigError(f"--resource {word}: expected NAME=FILE")
        resources[name] = Path(path).read_text(encoding="utf-8")
    return resources


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Numbers as JSON can hold them: what is not defined becomes None."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mmfuse score", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", nargs="?", type=Path, help='lines {"id", "prediction", "target"} plus task fields')
    parser.add_argument("--task", help="the task whose rules apply, such as pope")
    parser.add_argument("--protocol", help=f"whose rules: {', '.join(PROTOCOLS)}, …; the task's first one by default")
    parser.add_argument("--resource", action="append", default=[], metavar="NAME=FILE", help="a list that a task needs")
    parser.add_argument("--json", action="store_true", help="print {metric: value} and nothing else")
    parser.add_argument("--export-requests", type=Path, metavar="FILE", help="write what to ask a judge, do not score")
    parser.add_argument(
        "--judgements", type=Path, metavar="FILE", help='a judge\'s answers {"id", "judge", "judgement"}'
    )
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write what was parsed of each row, as JSONL")
    parser.add_argument("--tasks", action="store_true", help="list the tasks with their protocols and fields")
    return parser


def _judge(task: TaskScorer) -> Judge:
    if task.judge is None:
        raise ConfigError(f"task {task.name} asks no judge")
    return task.judge


def _export(path: Path, task: TaskScorer, rows: list[dict[str, Any]], resources: dict[str, str]) -> None:
    judge = _judge(task)
    for name, source in judge.resources.items():
        if name not in resources:
            raise ConfigError(f"requests of task {task.name} need the resource {name!r}: {source}")
    asked = requests(rows, judge.prompt, resources)
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(request, ensure_ascii=False) + "\n" for request in asked)
    print(f"{len(asked)} requests for {len(rows)} rows: {path}")


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
    # A lone half of a surrogate pair, which JSON can hold and UTF-8 cannot, stays an escape of JSON.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for sample in result.samples:
            file.write(json.dumps(vars(sample), ensure_ascii=False) + "\n")
