"""Runs of `mmfuse fit` in processes of their own, which are watched and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mmfuse.errors import RunError
from mmfuse.training.metrics_csv import read_rows

LOG = "log.txt"


class Trial:
    """One `mmfuse fit`, with all its workers and ranks in a process group.

    Args:
        words: of the command, without `fit` and `--out`.
        run: the run folder.
        log: where its output goes, behind what is there.
        before: called in the new process before it starts, to set limits.
    """

    def __init__(self, words: Sequence[str], run: Path, log: Path, *, before: Callable[[], None] | None = None) -> None:
        self.run, self.log = run, log
        resume = ["--ckpt_path", "last"] if (run / "checkpoints" / "last.ckpt").exists() else []
        command = [sys.executable, "-m", "mmfuse", "fit", *words, "--out", str(run), *resume]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=before
            )

    @property
    def pid(self) -> int:
        """Of the first process, rank 0."""
        return self._process.pid

    def wait(self, seconds: float = 86400.0) -> int:
        """Return the exit code; a signal's number is negative."""
        return self._process.wait(seconds)

    def reach(self, condition: Callable[[], bool], seconds: float = 86400.0) -> bool:
        """Wait until `condition` holds; False if the run ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None:
                return condition()
            if time.monotonic() > deadline:
                self.kill()
                raise RunError(f"{self.run}: nothing happened for {seconds:.0f} s, see {self.log}")
            time.sleep(0.005)
        return True

    def signal(self, number: int) -> None:
        """Send a signal to the first process alone."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to every process of the run, as when a machine fails."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_words(self, lines: int = 3) -> str:
        """The last lines of its output."""
        return " | ".join(self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


def step_of(run: Path) -> int:
    """The last step in a run's metrics."""
    path = run / "metrics.csv"
    try:
        rows = read_rows(path) if path.exists() else []
    except FileNotFoundError:  # replaced at this moment
        rows = []
    return int(rows[-1]["step"]) if rows else 0


def losses(run: Path) -> dict[int, str]:
    """The training loss of every step, as it was written."""
    return {int(row["step"]): row["train/loss"] for row in read_rows(run / "metrics.csv") if row.get("train/loss")}
