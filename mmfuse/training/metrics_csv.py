"""A CSV logger that holds every step once, however often a run was killed and resumed.

Lightning's own starts a new version folder at each start. This one keeps one file, drops the rows behind the checkpoint
that a run resumes from (they are computed again), and goes on below the rest.
"""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCSV(Logger):
    """Writes `metrics.csv`, one row for each step, columns in order of appearance.

    Every row reaches the operating system as soon as it is logged, so `kill -9` loses none.

    Args:
        path: the file; it is opened by the first `resume_from` or `log_metrics`, which keeps the rows that it holds.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = ["step"]
        self._last: dict[str, Any] = {}
        self._offset = 0  # where the last row begins

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are in the run folder's `config.yaml`."""

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Keep the rows up to `step`, which is where the run goes on; without a file there is nothing to keep."""
        if self.path.exists():
            self._write_all([row for row in read_rows(self.path) if int(row["step"]) <= step])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add `metrics` to the row of `step`: a new one, or the last one if that is of the same step."""
        if step is None:
            raise ValueError("MetricsCSV needs the step of what it logs")
        if self._columns == ["step"] and self.path.exists():
            self._write_all(read_rows(self.path))
        same = self._last.get("step") == step
        row = {**(self._last if same else {"step": step}), **metrics}
        added = [name for name in row if name not in self._columns]
        if added and self.path.exists():
            rows = read_rows(self.path)
            self._columns += added
            self._write_all([*(rows[:-1] if same else rows), row])
            return
        self._columns += added
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with open(self.path, "r+b" if not new else "wb") as file:
            if new:
                file.write(self._line(dict(zip(self._columns, self._columns, strict=True))))
            else:
                file.seek(self._offset if same else 0, os.SEEK_SET if same else os.SEEK_END)
                file.truncate()
            self._offset = file.tell()
            file.write(self._line(row))
        self._last = row

    @rank_zero_only
    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        """Write the file anew, in one step."""
        for row in rows:
            self._columns += [name for name in row if name not in self._columns]
        scratch = self.path.with_suffix(".csv.tmp")
        with open(scratch, "wb") as file:
            file.write(self._line(dict(zip(self._columns, self._columns, strict=True))))
            for row in rows:
                self._offset = file.tell()
                file.write(self._line(row))
        os.replace(scratch, self.path)
        self._last = {**rows[-1], "step": int(rows[-1]["step"])} if rows else {}

    def _line(self, row: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([_cell(row.get(name, "")) for name in self._columns])
        return text.getvalue().encode()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file as written; a last line that was cut off is left out."""
    text = Path(path).read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(complete)))


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
