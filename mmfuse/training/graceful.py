"""Stopping when the machine is taken away: finish the step, save, exit with 143.

Schedulers announce the end of a job with SIGTERM (SLURM, Kubernetes, spot instances) or SIGUSR1 (SLURM's
`--signal=USR1@120`), to one process or to all. Lightning's own handler runs a collective inside the signal handler,
which waits for ranks that are inside another one: two ranks hang as a rule. Here the handler sets a flag and nothing
else, and the ranks agree on it at the end of an optimizer step.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from mmfuse.errors import StoppedError

#: What asks a run to stop.
SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)


class NoSignalHandlers(_SignalConnector):
    """Takes the place of Lightning's signal handlers and installs none."""

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False


class GracefulStop(Checkpoint):
    """Saves `checkpoint` and ends the run after the optimizer step in which any rank was signalled.

    It is a `Checkpoint` because Lightning runs those behind all other callbacks, whose state belongs into the file.

    A signal before the first step takes effect at its end, and one during validation at the end of the step behind it.

    Args:
        checkpoint: the file to save to.

    Raises:
        StoppedError: on rank 0. Other ranks end without a message: with 143, or with 0 if rank 0 has launched them,
            because Lightning's launcher kills rank 0 when a rank that it has launched fails.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received: signal.Signals | None = None
        self._checked = -1
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self.received = None
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._checked:  # in the middle of an accumulated step
            return
        self._checked = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            trainer.save_checkpoint(self.checkpoint)
            raise self._end(trainer)

    def _end(self, trainer: Trainer) -> BaseException:
        if trainer.is_global_zero:
            by = self.received.name if self.received else "a signal to another rank"
            return StoppedError(
                f"stopped by {by} after step {trainer.global_step}; saved in {self.checkpoint}. "
                "The same command with --ckpt_path last goes on"
            )
        launcher = trainer.strategy.launcher
        launched_by_rank_0 = isinstance(launcher, _SubprocessScriptLauncher) and (
            not launcher.cluster_environment.creates_processes_externally
        )
        return SystemExit(0 if launched_by_rank_0 else StoppedError.exit_code)
