"""What watches a fit: the metrics of each step, and the progress that people see."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmfuse.training.module import MultimodalModule


class StepSeeds(Callback):
    """Seeds torch before every batch from the run's seed and the batch's place: its step, and its number in that.

    Dropout thereby draws the same numbers after a resume, whatever was drawn before: by loaders that were opened, by
    validation, by a run of another length. Without it a checkpoint would have to hold the state of every generator.
    Batches are numbered over all ranks, as in the plan of the data: a step of four draws the same on 1 rank as on 4.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._step = -1
        self._micro = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._micro = self._micro + 1 if trainer.global_step == self._step else 0
        self._step = trainer.global_step
        place = self._micro * trainer.world_size + trainer.global_rank
        torch.manual_seed(hashed_seed(self.seed, self._step, place))


def hashed_seed(*numbers: int) -> int:
    """A seed of 63 bits from integers; near numbers give seeds that have nothing in common."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class StepMetrics(Callback):
    """Logs each optimizer step to the trainer's loggers, and its validation scores in the same row.

    Lightning logs a step after the callbacks that save checkpoints, so a kill between the two would lose the row of a
    step that the checkpoint already holds. This callback stands before them.

    Args:
        window: optimizer steps over which throughput is averaged.
    """

    def __init__(self, window: int = 20) -> None:
        self._recent: deque[tuple[float, dict[str, int]]] = deque(maxlen=window)
        self._begun = 0.0
        self._logged = 0
        self.total_tokens = 0
        self.total_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.perf_counter()
        self._logged = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._logged:
            return
        assert isinstance(pl_module, MultimodalModule)
        step = pl_module.last_step
        assert step is not None
        now = time.perf_counter()
        seconds = now - self._begun
        self._recent.append((seconds, dict(step.tokens)))
        self.total_seconds += seconds
        self.total_tokens += sum(step.tokens.values())
        self._begun, self._logged = now, trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            rates = {
                f"lr/{part}": pl_module.schedule.learning_rate(part, trainer.global_step - 1)
                for part in pl_module.schedule.trained_parts()
            }
            speeds = {f"tokens_per_second/{name}": speed for name, speed in self.throughput().items()}
            totals = {"train/loss": step.loss, "train/supervised_tokens": step.supervised, "train/seconds": seconds}
            self._log(trainer, {**totals, **rates, **speeds})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Validation is no training time.
        self._begun += time.perf_counter() - self._paused
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self._log(trainer, scores)

    @staticmethod
    def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def throughput(self) -> dict[str, float]:
        """Live tokens a second of each modality that occurs, over the last steps, on all ranks together."""
        seconds = sum(elapsed for elapsed, _ in self._recent)
        if not seconds:
            return {}
        names = self._recent[-1][1]
        totals = {name: sum(tokens[name] for _, tokens in self._recent) for name in names}
        return {name: total / seconds for name, total in totals.items() if total}

    @property
    def tokens_per_second(self) -> float:
        """Live tokens of all modalities a second, over the whole fit, without validation."""
        return self.total_tokens / self.total_seconds if self.total_seconds else 0.0


def progress_items(trainer: Trainer) -> dict[str, str]:
    """What a progress display says beside the bar: stage, loss, last validation, and tokens a second by modality."""
    module = trainer.lightning_module
    if not isinstance(module, MultimodalModule) or module.last_step is None:
        return {}
    _, stage, _ = module.schedule.at(max(0, trainer.global_step - 1))
    items = {"stage": stage.name, "loss": f"{module.last_step.loss:.3f}"}
    if "val/exact_match" in trainer.callback_metrics:
        items["val"] = f"{float(trainer.callback_metrics['val/exact_match']):.1%}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StepMetrics):
            speeds = [f"{name} {_short(speed)}" for name, speed in callback.throughput().items()]
            items["tok/s"] = " ".join(speeds)
    return items


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


class TerminalProgress(RichProgressBar):
    """Lightning's rich bar, narrow enough that the stage and tokens a second by modality stand on the same line."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4, leave=True)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        ]

    @property
    def test_description(self) -> str:
        return "Held-out questions"

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return dict(progress_items(trainer))


class PlainProgress(ProgressBar):
    """A line now and then, for output that is no terminal.

    Args:
        seconds: between lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._next = 0.0
        self._enabled = True

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        done = trainer.global_step >= trainer.max_steps > 0
        if self._due(done):
            items = ", ".join(f"{name} {value}" for name, value in progress_items(trainer).items())
            self._say(f"step {trainer.global_step}/{trainer.max_steps}: {items}")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        total = sum(trainer.num_test_batches)
        if self._due(batch_idx + 1 == total):
            self._say(f"held-out questions: batch {batch_idx + 1}/{total} answered, with the image and without")

    def _due(self, last: bool) -> bool:
        if not self._enabled or not (last or time.monotonic() >= self._next):
            return False
        self._next = time.monotonic() + self._seconds
        return True

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def progress_callback() -> ProgressBar:
    """A bar in a terminal, plain lines elsewhere."""
    return TerminalProgress() if sys.stdout.isatty() else PlainProgress()


class ModelSummary(Callback):
    """Prints, before training, the parameters of each part and the stages that tune it."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, MultimodalModule)
            Console(stderr=True).print(summary_table(pl_module))


def summary_table(module: MultimodalModule) -> Table:
    """Parameters by part; for each stage the learning rate, or that the part is frozen."""
    table = Table(title=f"fusion: {type(module.network.fusion).__name__}", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    if module.adapter is not None:
        table.add_column(f"{module.adapter.kind}, rank {module.adapter.r}\ntrainable", justify="right")
    for stage in module.schedule.stages:
        table.add_column(f"{stage.name}\n{stage.steps} steps, {stage.fusion or 'own'} fusion", justify="right")
    for part, network in module.network.parts().items():
        count = sum(parameter.numel() for parameter in network.parameters())
        cells = [
            f"lr {stage.lr[part]:g}" if stage.trains(part) else "frozen" if count else "–"
            for stage in module.schedule.stages
        ]
        if module.adapter is not None:
            trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
            cells = [f"{trainable:,}", *cells]
        table.add_row(part, f"{count:,}", *(cell if count else "–" for cell in cells))
    return table
