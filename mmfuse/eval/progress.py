"""Shows how far an evaluation is: a bar with the running score where somebody looks, plain lines where nobody does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmfuse.eval.runner import Record
from mmfuse.eval.tasks.items import Task

#: Seconds between two lines of a log.
LINE_EVERY = 10.0

#: From answers to the share that is right (None where that has no meaning) and the number that could not be parsed.
Judge = Callable[[Task, Sequence[Record]], tuple[float | None, int]]


class Running:
    """Counts what has been answered.

    Args:
        judge: scores some answers.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.task: Task | None = None
        self.total = self.done = self.errors = self.unparsed = 0
        self._right = 0.0
        self._scored = 0

    def begin(self, task: Task, total: int, done: Sequence[Record]) -> None:
        self.task, self.total = task, total
        self.done = self.errors = self.unparsed = self._scored = 0
        self._right = 0.0
        self.answered(done)

    def answered(self, records: Sequence[Record]) -> None:
        assert self.task is not None
        self.done += len(records)
        usable = [record for record in records if "error" not in record]
        self.errors += len(records) - len(usable)
        if usable:
            score, unparsed = self._judge(self.task, usable)
            self.unparsed += unparsed
            if score is not None:
                self._right, self._scored = self._right + score * len(usable), self._scored + len(usable)

    def status(self) -> str:
        """`"71.4 %, 3 unparsed"`: what is known so far."""
        parts = [f"{self._right / self._scored:.1%}"] if self._scored else []
        seen = max(1, self.done - self.errors)
        parts += [f"unparsed {self.unparsed / seen:.1%}"] if self.unparsed else []
        parts += [f"{self.errors} errors"] if self.errors else []
        return ", ".join(parts)


class BarWatcher(Running):
    """A bar for each task; use as a context manager."""

    def __init__(self, judge: Judge, console: Console) -> None:
        super().__init__(judge)
        columns: list[Any] = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        ]
        self._progress = Progress(*columns, console=console)
        self._bar: Any = None

    def __enter__(self) -> BarWatcher:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, task: Task, total: int, done: Sequence[Record]) -> None:
        self._bar = self._progress.add_task(task.name, total=total, status="")
        super().begin(task, total, done)

    def answered(self, records: Sequence[Record]) -> None:
        super().answered(records)
        self._progress.update(self._bar, completed=self.done, status=self.status())


class LineWatcher(Running):
    """Plain lines, one at the end of each task and in between one every so often."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge)
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> LineWatcher:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def begin(self, task: Task, total: int, done: Sequence[Record]) -> None:
        self._begun = self._said = time.monotonic()
        super().begin(task, total, done)

    def answered(self, records: Sequence[Record]) -> None:
        super().answered(records)
        now = time.monotonic()
        if records and (self.done == self.total or now - self._said >= LINE_EVERY):
            assert self.task is not None
            self._said = now
            line = f"{self.task.name}: {self.done}/{self.total}, {now - self._begun:.0f} s, {self.status()}"
            print(line, file=sys.stderr, flush=True)
