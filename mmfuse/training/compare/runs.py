"""The runs of a comparison: each is `mmfuse fit` in a process of its own, so that none takes the others with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from mmfuse.errors import ConfigError
from mmfuse.training.checkpoints import FOLDER
from mmfuse.training.compare.strategies import differences
from mmfuse.training.reporting import PREDICTIONS, RESULTS

#: Seconds that an interrupted child has to end before it is killed.
PATIENCE = 30.0
#: Lines of a failed run's log that are shown.
TAIL = 8


@dataclass(frozen=True)
class Run:
    """One strategy under one seed.

    Attributes:
        label: the strategy's.
        seed: of the initial weights and the order of samples.
        folder: the run folder.
        words: of `fit`, without the checkpoint.
        settings: what they resolve to.
    """

    label: str
    seed: int
    folder: Path
    words: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.label} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return total_steps(self.settings)

    @property
    def steps_done(self) -> int:
        """Steps that `metrics.csv` holds."""
        return last_step(self.folder / "metrics.csv")

    @property
    def results(self) -> dict[str, Any] | None:
        """What the finished run measured; None while it is unfinished."""
        path = self.folder / RESULTS
        results: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return results if results is not None and "exact_match" in results else None

    @property
    def predictions(self) -> Path:
        return self.folder / PREDICTIONS

    def check_config(self) -> None:
        """Refuse a folder that holds a run of another config.

        Raises:
            ConfigError: naming the first key that differs.
        """
        path = self.folder / "config.yaml"
        if not path.exists():
            return
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, before, now in differences(held, self.settings):
            # A folder may have been moved, or named by another path.
            if key != "out":
                raise ConfigError(
                    f"{self.folder} holds a run of another config: {key} is {before} there and {now} now; "
                    "choose another --out, or move that folder away"
                )

    def resume_words(self) -> list[str]:
        """The words of `fit` that start this run, or continue it where there is a checkpoint."""
        going_on = (self.folder / FOLDER / "last.ckpt").exists()
        return ["fit", *self.words, *(["--ckpt_path", "last"] if going_on else [])]


@dataclass(frozen=True)
class Failure:
    """A run that did not end as it should.

    Attributes:
        run: which one.
        reason: in a few words.
        tail: the last lines of its log.
    """

    run: Run
    reason: str
    tail: str

    def __str__(self) -> str:
        tail = "".join(f"\n    {line}" for line in self.tail.splitlines())
        return f"{self.run.name} failed ({self.reason}); {self.run.log} ends with:{tail}"


class Watcher(Protocol):
    """Shows people how far the runs are."""

    def begin(self, run: Run) -> None: ...
    def tick(self, run: Run) -> None: ...
    def end(self, run: Run, failure: Failure | None) -> None: ...


def train(runs: Sequence[Run], watcher: Watcher, *, every: float = 0.5) -> list[Failure]:
    """Train what is not finished, one run after the other.

    Args:
        runs: in this order.
        watcher: is told of every beginning and end, and in between every so often.
        every: seconds between looks at a run.

    Returns:
        The runs that failed; the others are finished.
    """
    failures = []
    for run in runs:
        failure = None if run.results is not None else _train_one(run, watcher, every)
        watcher.end(run, failure)
        if failure is not None:
            failures.append(failure)
    return failures


def _train_one(run: Run, watcher: Watcher, every: float) -> Failure | None:
    watcher.begin(run)
    code = run_command(run.resume_words(), run.log, lambda: watcher.tick(run), every)
    if code == 0 and run.results is not None:
        return None
    reason = f"exit code {code}" if code else f"it left no scores in {RESULTS}"
    return Failure(run, reason, tail(run.log))


def run_command(words: Sequence[str], log: Path, look: Callable[[], None] = lambda: None, every: float = 0.5) -> int:
    """Run `mmfuse` with `words` in a process of its own and wait for it; if we are interrupted, it ends with us.

    Args:
        words: the command and its flags.
        log: what it prints is appended here.
        look: called every so often while it runs.
        every: seconds between two calls of `look`.

    Returns:
        Its exit code; negative if a signal ended it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file, _ended_by_sigterm():
        command = [sys.executable, "-m", "mmfuse", *words]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    return child.wait(every)
                except subprocess.TimeoutExpired:
                    look()
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Interrupt the child if it still runs, and kill it if it does not listen."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGINT)
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Also behind a second Ctrl-C, which ends the waiting.
        child.kill()
        child.wait()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends us as Ctrl-C does: by default it would leave the child running without us."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def total_steps(settings: Mapping[str, Any]) -> int:
    """Optimizer steps of a run with these settings."""
    limit = settings["trainer"]["max_steps"]
    return limit if limit not in (None, -1) else sum(stage["steps"] for stage in settings["stages"])


def last_step(metrics: Path) -> int:
    """The step of the last row of a `metrics.csv`; 0 without one. Reads the file's end only."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 4096))
        cells = [line.partition(b",")[0] for line in file.read().splitlines()[1:]]
    numbers = [int(cell) for cell in cells if cell.isdigit()]
    return numbers[-1] if numbers else 0


def tail(log: Path, lines: int = TAIL) -> str:
    """The last lines of a log that are not blank."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
