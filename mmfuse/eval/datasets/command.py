"""`mmfuse tasks`: the benchmarks whose official files can be read, and which of them lie below a folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfuse.errors import ConfigError
from mmfuse.eval.datasets.official import BENCHMARKS, Benchmark, find_files
from mmfuse.eval.scorers.table import SCORERS


def main(argv: Sequence[str]) -> int | None:
    """Run `mmfuse tasks` with the words of the command line, its own name first."""
    asked = _parser().parse_args(list(argv)[1:])
    if asked.check and asked.data_root is None:
        raise ConfigError("--check needs --data-root, the folder to look in")
    rows = [_row(benchmark, asked.data_root if asked.check else None) for benchmark in BENCHMARKS.values()]
    if asked.json:
        print(json.dumps(rows))
    else:
        print("\n".join(_lines(row, asked.check) for row in rows))
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mmfuse tasks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="say which files are there and which are missing")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="the folder below which the files lie")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return parser


def _row(benchmark: Benchmark, root: Path | None) -> dict[str, Any]:
    entry = SCORERS[benchmark.task]
    row: dict[str, Any] = {
        "name": benchmark.name,
        "task": entry.name,
        "files": list(benchmark.patterns),
        "source": entry.data,
        "licence": entry.licence,
    }
    if root is not None:
        found = find_files(root, benchmark)
        row |= {"found": [str(path) for path in found.files], "bytes": found.bytes}
    return row


def _lines(row: dict[str, Any], check: bool) -> str:
    head = f"{row['name']:<20}  task {row['task']:<16}"
    wanted = f"{' or '.join(row['files'])}  from {row['source']}  (licence: {row['licence']})"
    if not check:
        return f"{head}  {wanted}"
    if row["found"]:
        return f"{head}  found, {row['bytes'] / 1e6:.1f} MB: {', '.join(row['found'])}"
    return f"{head}  missing: {wanted}"
