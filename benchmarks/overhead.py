"""What mmfuse and Lightning cost on top of a bare PyTorch loop over the same modules and the same data.

    python benchmarks/overhead.py --config configs/aki.yaml --steps 40 --rounds 5

Both sides read the same batches of the last stage, collate them, run the network under its own fusion, and step AdamW.
The framework's side also has what a user gets by default: schedule, logging to CSV and TensorBoard, metrics of every
step, and gradient clipping (the bare loop clips, too). Rounds alternate, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from mmfuse.data import BatchStream, StreamLoader
from mmfuse.data.stream import ORIGIN
from mmfuse.training.callbacks import StepMetrics
from mmfuse.training.cli import parse_and_build
from mmfuse.training.data import MultimodalData
from mmfuse.training.metrics_csv import MetricsCSV
from mmfuse.training.module import MultimodalModule


class StepTimer(Callback):
    """Seconds of each step, from the end of the one before to its own end, so that loading counts."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())


def bare_loop(module: MultimodalModule, data: MultimodalData, start: int, steps: int) -> list[float]:
    network, processor = module.network.train(), module.processor
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, betas=(0.9, 0.95))
    loader = StreamLoader(BatchStream(data.plan(), data.encoding(processor), start=start))
    marks: list[float] = []
    for batch in loader:
        del batch["keys"], batch[ORIGIN]
        network(**batch, return_logits=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        if len(marks) == steps:
            break
    return durations(marks)


def through_lightning(
    module: MultimodalModule, data: MultimodalData, start: int, steps: int, folder: Path
) -> list[float]:
    timer = StepTimer()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=steps,
        logger=[MetricsCSV(folder / "metrics.csv"), TensorBoardLogger(folder, name="tensorboard", version="")],
        callbacks=[StepMetrics(), timer],
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return durations(timer.marks)


def durations(marks: list[float], warm_up: int = 5) -> list[float]:
    """Seconds between marks, without the first steps, in which memory is allocated."""
    return [later - earlier for earlier, later in zip(marks[warm_up:], marks[warm_up + 1 :], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/aki.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # One stage, so that both sides run the same steps: the last, under the model's own fusion.
        cli = parse_and_build(["--config", options.config, "--out", scratch], run=False)
        module, data = cli.model, cli.datamodule
        data.prepare_data()
        data.setup("fit")
        last = data.stages[-1]
        data.stages, module.schedule = [last], type(module.schedule)([last])
        module.stage_fusions = module.stage_fusions[-1:]
        module.ema_decay = None
        bare: list[float] = []
        framework: list[float] = []
        for _ in range(options.rounds):
            bare += bare_loop(module, data, 0, options.steps)
            framework += through_lightning(module, data, 0, options.steps, Path(scratch))
    one, other = statistics.median(bare), statistics.median(framework)
    print(f"{torch.get_num_threads()} threads, {len(bare)} steps each, median of a step")
    print(f"bare PyTorch loop    {1000 * one:7.1f} ms")
    print(f"mmfuse + Lightning   {1000 * other:7.1f} ms")
    print(f"ratio                {other / one:7.3f}")


if __name__ == "__main__":
    main()
