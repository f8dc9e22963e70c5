"""Evaluation during training: the first items of some tasks are answered at every validation."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from mmfuse.errors import ConfigError
from mmfuse.eval.engine import NetworkEngine
from mmfuse.eval.runner import RunSettings, run_task
from mmfuse.eval.scoring import score_run
from mmfuse.eval.tasks import find_tasks


class TaskScores(Callback):
    """Logs `eval/TASK` (the primary metric) and `eval/TASK/unparsed` at the end of each validation of a fit.

    The first rank answers alone while the others wait, so that numbers are those of `mmfuse eval --limit` on one
    device. Sharded strategies, whose single ranks hold no whole model, are refused.

    Args:
        tasks: tasks or groups, as in `mmfuse eval --tasks`.
        limit: the first items of each that are answered.
        batch_tokens: tokens of a batch with padding.

    Raises:
        ConfigError: there is no such task, or a limit below 1.
    """

    def __init__(self, tasks: Sequence[str], limit: int = 32, batch_tokens: int = 16384) -> None:
        if limit < 1:
            raise ConfigError(f"TaskScores: limit must be at least 1, got {limit}")
        self.tasks = [task.first(limit) for task in find_tasks(list(tasks))]
        self.settings = RunSettings(batch_tokens=batch_tokens)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ConfigError("TaskScores needs a whole model on each rank; evaluate sharded runs with `mmfuse eval`")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        scores = self._scores(pl_module) if trainer.is_global_zero else {}
        scores = trainer.strategy.broadcast(scores)
        pl_module.log_dict({name: torch.tensor(value) for name, value in scores.items()}, rank_zero_only=True)

    def _scores(self, module: Any) -> dict[str, float]:
        engine = NetworkEngine(module.network, module.processor)
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for task in self.tasks:
                score = score_run(run_task(engine, task, Path(folder), self.settings))
                found[f"eval/{task.name}"] = score.primary[1].value
                found[f"eval/{task.name}/unparsed"] = score.unparsed_rate
        return found
