"""What ties the stream of samples to the trainer: a state that follows the steps, and a log of their samples."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mmfuse.data.stream import ORIGIN
from mmfuse.errors import DataError
from mmfuse.training.data import MultimodalData

SAMPLES: Final = "samples.jsonl"


class StreamState(Callback):
    """Commits each batch when it was trained on.

    Lightning has fetched the next batch before it saves a step, so the state of a loader would be one batch ahead.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts batches of one rank; with another number of ranks a step has another number of them.
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        if progress is None or _data(trainer) is None:
            return
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            # All by the same: a checkpoint at the end of a batch has one that is not completed.
            shift = batches - counts["ready"]
            counts.update({name: count + shift for name, count in counts.items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = _data(trainer)
        if data is None or data.progress is None:
            return
        data.progress.commit(batch[ORIGIN])
        if trainer.global_step > data.progress.steps:
            data.progress.end_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = _data(trainer)
        if data is None or data.progress is None:
            return
        kinds = ("truncated", "dropped")
        counts = data.state_dict()["counts"]
        said = [
            f"{count} of {name.partition('/')[2]} {name.partition('/')[0]}"
            for name, count in counts.items()
            if name.startswith(kinds)
        ]
        if said and trainer.is_global_zero:
            used = sum(count for name, count in counts.items() if name.startswith("used"))
            print(f"mmfuse: {used} samples trained on; too long: {', '.join(said)}", file=sys.stderr)


class SampleLog(Callback):
    """Writes the ids of the samples of each optimizer step, of all ranks, in the order of the plan.

    A line is `{"step": 1, "batches": [["align/align-0000.tar:align-000003", ...], ...]}`. Two runs that print the same
    lines were trained on the same samples, in the same order, packed in the same way.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SAMPLES
        self._pending: list[Mapping[str, Any]] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            _keep_until(self._path, self._step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pending.append(batch[ORIGIN])
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        done, self._pending = self._pending, []
        ranks: list[Any] = [done]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, done)
        if trainer.is_global_zero:
            origins = sorted((origin for rank in ranks for origin in rank), key=lambda origin: origin["batch"])
            line = json.dumps({"step": self._step, "batches": [origin["ids"] for origin in origins]})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def read_sample_log(run: Path) -> dict[int, list[list[str]]]:
    """The batches of each optimizer step, as lists of `source/key`.

    Raises:
        DataError: a line that a kill has cut off.
    """
    steps = {}
    for number, line in enumerate((run / SAMPLES).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{run / SAMPLES}, line {number}: unreadable, written in part: {error}") from error
        steps[int(entry["step"])] = entry["batches"]
    return steps


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps that will be made again, and a last one that is incomplete."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text("".join(kept), encoding="utf-8")
    os.replace(scratch, path)


def _data(trainer: Trainer) -> MultimodalData | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, MultimodalData) else None
