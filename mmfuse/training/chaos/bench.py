"""Runs that faults are made in, and the one that is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmfuse.errors import RunError
from mmfuse.training.checkpoints import damage, last_path, read_checkpoint
from mmfuse.training.trials import LOG, Trial
from mmfuse.training.verify_resume import first_difference

#: Seconds after which a run that should have ended is taken to hang.
PATIENCE = 3600.0


class Outcome(NamedTuple):
    """What a fault did."""

    passed: bool
    happened: str


class Bench:
    """Starts runs of one config.

    Args:
        words: of `mmfuse fit`, without `fit` and `--out`.
        out: folder for all runs.
        steps: optimizer steps of a run.
    """

    def __init__(self, words: Sequence[str], out: Path, steps: int) -> None:
        self.words, self.out, self.steps = list(words), out, steps
        self._whole: dict[tuple[str, ...], Path] = {}

    def start(
        self,
        run: str,
        *more: str,
        steps: int | None = None,
        every: int | None = None,
        before: Callable[[], None] | None = None,
    ) -> Trial:
        """Start a run, or go on with it if it has a checkpoint.

        Args:
            run: its folder, in that of the bench.
            more: further words of `mmfuse fit`.
            steps: after which it ends; by default those of the bench.
            every: steps between checkpoints; by default half of them all.
            before: called in the new process before it starts.
        """
        size = ["--trainer.max_steps", str(steps or self.steps), "--checkpoint_every", str(every or self.steps // 2)]
        folder = self.out / run
        return Trial(
            [*self.words, *size, "--log_samples", *more], folder, folder.with_name(f"{run}-{LOG}"), before=before
        )

    def finish(self, run: str, *more: str, steps: int | None = None, every: int | None = None) -> Path:
        """As `start`, and wait for its end.

        Raises:
            RunError: it fails.
        """
        trial = self.start(run, *more, steps=steps, every=every)
        if code := trial.wait(PATIENCE):
            raise RunError(f"the run ends with {code} by itself: {trial.last_words()}")
        return trial.run

    def whole(self, *more: str) -> Path:
        """The folder of a run with these words that was left alone; it is made once."""
        if more not in self._whole:
            self._whole[more] = self.finish(f"whole-{len(self._whole)}", *more)
        return self._whole[more]

    def same(self, run: Path, done: str, *more: str) -> Outcome:
        """Whether a run had the samples and losses of the one that was left alone; `done` is what was done to it."""
        difference = first_difference(self.whole(*more), run)
        return Outcome(difference is None, difference or f"{done}; samples and losses are equal")


def fault(name: str, **arguments: Any) -> str:
    """The word that brings a callback of `injected` into a run."""
    callback = {"class_path": f"mmfuse.training.chaos.injected.{name}", "init_args": arguments}
    return f"--trainer.callbacks+={json.dumps(callback)}"


def refused(trial: Trial, says: str, codes: Sequence[int] = (1,)) -> Outcome:
    """Wait for a run that should fail, with one of some exit codes and a message."""
    code = trial.wait(PATIENCE)
    words = said(trial)
    return Outcome(code in codes and says in words, f"exit code {code}: {words}")


def said(trial: Trial) -> str:
    """The message that a run ended with; threads that its end surprises may print something behind it."""
    lines = trial.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("mmfuse: error")), trial.last_words(1))


def saved_step(run: Path) -> tuple[int, str | None]:
    """The step of a run's last checkpoint, and what is wrong with that."""
    wrong = damage(last_path(run))
    return (
        (0, wrong) if wrong is not None else (read_checkpoint(last_path(run), map_location="cpu")["global_step"], None)
    )
