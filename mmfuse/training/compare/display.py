"""How far the runs of a comparison are: bars in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mmfuse.training.compare.runs import Failure, Run, Watcher


class Bars:
    """A bar for each run.

    Args:
        progress: started by the caller.
        runs: all of them, also those that are finished already.
    """

    def __init__(self, progress: Progress, runs: Sequence[Run]) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {
            run.name: progress.add_task(run.name, total=run.steps, start=False, status="waits") for run in runs
        }

    def begin(self, run: Run) -> None:
        # What was made before must not count as speed.
        self._progress.update(self._tasks[run.name], completed=run.steps_done, status="trains")
        self._progress.start_task(self._tasks[run.name])

    def tick(self, run: Run) -> None:
        done = run.steps_done
        status = "is evaluated" if done >= run.steps else "trains"
        self._progress.update(self._tasks[run.name], completed=done, status=status)

    def end(self, run: Run, failure: Failure | None) -> None:
        task = self._tasks[run.name]
        if failure is None:
            self._progress.update(task, completed=run.steps, status=score_text(run))
        else:
            self._progress.update(task, completed=run.steps_done, status="[red]failed[/red]")
            self._progress.console.print(str(failure), markup=False, highlight=False, soft_wrap=True)
        self._progress.stop_task(task)


class Lines:
    """A line when a run begins and ends, and now and then between.

    Args:
        console: where they go.
        runs: all of them.
        seconds: between lines.
    """

    def __init__(self, console: Console, runs: Sequence[Run], seconds: float = 30.0) -> None:
        self._console = console
        self._places = {run.name: f"[{place}/{len(runs)}] {run.name}" for place, run in enumerate(runs, 1)}
        self._seconds = seconds
        self._begun = self._next = 0.0
        self._steps_before = 0

    def begin(self, run: Run) -> None:
        self._begun = time.monotonic()
        self._next = self._begun + self._seconds
        self._steps_before = run.steps_done
        going_on = f", continued from step {self._steps_before}" if self._steps_before else ""
        self._say(run, f"trains {run.steps} steps{going_on}; log: {run.log}")

    def tick(self, run: Run) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._seconds
        done = run.steps_done
        made = done - self._steps_before
        remaining = f", about {(run.steps - done) * (now - self._begun) / made:.0f} s remain" if made > 0 else ""
        self._say(run, f"step {done}/{run.steps}{remaining}")

    def end(self, run: Run, failure: Failure | None) -> None:
        self._say(run, score_text(run) if failure is None else str(failure))

    def _say(self, run: Run, text: str) -> None:
        self._console.print(f"{self._places[run.name]}: {text}", markup=False, highlight=False, soft_wrap=True)


def score_text(run: Run) -> str:
    """What a finished run reached."""
    results = run.results
    return "" if results is None else f"exact match {results['exact_match']:.1%}"


@contextmanager
def watching(console: Console, runs: Sequence[Run]) -> Iterator[Watcher]:
    """What shows the runs on this console."""
    if not console.is_terminal:
        yield Lines(console, runs)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress, runs)
