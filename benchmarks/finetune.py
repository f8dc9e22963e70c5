"""What LoRA costs through mmfuse, beside `transformers.Trainer` and, if it is installed, TRL's `SFTTrainer`.

    python benchmarks/finetune.py --steps 30 --rounds 3

The same small LLaVA, saved to disk; the same folder of chats with an image and answers of very different lengths; the
same adapter of PEFT, optimizer, clipping and number of threads. Trainer gets the very batches that mmfuse trained on,
collated by the same code, and before anything is timed its losses must agree with mmfuse's. TRL has its own order and
collator, and teaches questions, too. mmfuse runs as users run it: schedule, logging of every step to CSV and
TensorBoard, and a stream that can resume; the others log to nothing. Rounds alternate.

Printed are the median seconds of a step on padded batches, and samples per second over all steps, where mmfuse also
packs: one row of as many tokens as the samples of a padded batch hold on average.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, TrainingArguments
from transformers import Trainer as HFTrainer

from mmfuse.data import Sample, encode_sample, open_source
from mmfuse.data.sources.undecoded import decoded
from mmfuse.data.stream import ORIGIN
from mmfuse.models.adopt.processor import AdoptedProcessor
from mmfuse.testing.vlms import WORDS, tiny_vlm
from mmfuse.training.callbacks import StepMetrics
from mmfuse.training.cli import parse_and_build
from mmfuse.training.metrics_csv import MetricsCSV
from mmfuse.training.module import MultimodalModule

RATE, RANK = 1e-4, 8
WARM_UP = 5
SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class Timed:
    """A training run.

    Attributes:
        marks: when each step ended, loading of its batch included.
        losses: of each step.
        keys: of the samples of each step.
    """

    marks: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of each step, without the first ones, in which memory is allocated."""
        marks = self.marks[WARM_UP - 1 :]
        return [later - earlier for earlier, later in pairwise(marks)]


class LightningMarks(Callback):
    """Fills a `Timed` from Lightning's loop."""

    def __init__(self, timed: Timed) -> None:
        self.timed = timed

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, MultimodalModule) and pl_module.last_step is not None
        self.timed.losses.append(pl_module.last_step.loss)
        self.timed.keys.append([name.partition("/")[2] for name in batch[ORIGIN]["ids"]])
        self.timed.marks.append(time.perf_counter())


class TrainerMarks(TrainerCallback):
    """Fills a `Timed` from Trainer's loop."""

    def __init__(self, timed: Timed) -> None:
        self.timed = timed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timed.marks.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.timed.losses.append(logs["loss"])


def write_inputs(folder: Path, chats: int) -> None:
    """A model, and chats with answers of 5 to 400 words, most of them short."""
    model, processor = tiny_vlm("llava", **SIZE)
    model.save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    rng, pixels, rows = random.Random(0), np.random.default_rng(0), []
    for number in range(chats):
        length = min(400, max(5, round(rng.lognormvariate(3.7, 0.9))))
        Image.fromarray(pixels.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        answer = " ".join(rng.choices(WORDS[2:20], k=length))
        chat = [{"role": "user", "content": "<image>what is this ?"}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": chat, "images": [f"{number}.png"]}))
    (folder / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")


def through_mmfuse(folder: Path, steps: int, batch: int, pack_to: int | None = None) -> Timed:
    settings = {
        "seed_everything": 0,
        "stages": [{"name": "tune", "steps": steps, "data": {"chats": 1.0}, "lr": {"decoder": RATE}, "final_lr": 1.0}],
        "model": {
            "network": {"vlm": {"pretrained": str(folder / "vlm")}},
            "adapter": {"r": RANK, "alpha": 2 * RANK, "targets": ["decoder.attention", "decoder.mlp"]},
            "optimizer": {"weight_decay": 0.0, "betas": [0.9, 0.999]},
        },
        "data": {
            "class_path": "MultimodalData",
            "init_args": {
                "train": {"chats": {"path": str(folder / "chats.jsonl")}},
                "batch_size": batch if pack_to is None else 1,
                "stream": {"pack_to": pack_to, "lanes": 1},
            },
        },
        "trainer": {"accelerator": "cpu"},
    }
    config, run, timed = folder / "config.yaml", folder / "run", Timed()
    config.write_text(json.dumps(settings), encoding="utf-8")
    cli = parse_and_build(["--config", str(config), "--out", str(run)], run=False)
    cli.datamodule.prepare_data()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=steps,
        logger=[MetricsCSV(run / "metrics.csv"), TensorBoardLogger(run, name="tensorboard", version="")],
        callbacks=[StepMetrics(), LightningMarks(timed)],
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(cli.model, datamodule=cli.datamodule)
    return timed


def model_with_adapter(folder: Path) -> torch.nn.Module:
    model = AutoModelForImageTextToText.from_pretrained(folder / "vlm", dtype=torch.float32)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    tuned: torch.nn.Module = get_peft_model(model, adapter)
    return tuned


def arguments(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """What `TrainingArguments` and `SFTConfig` are given."""
    return {
        "output_dir": str(folder / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def through_trainer(folder: Path, order: Sequence[Sequence[str]]) -> Timed:
    """Trainer over the samples with these keys, batch by batch."""
    source = open_source(folder / "chats.jsonl")
    numbers = {source.key(number): number for number in range(len(source))}
    processor = AdoptedProcessor(AutoProcessor.from_pretrained(folder / "vlm"))

    def collate(samples: Sequence[int]) -> Mapping[str, Any]:
        read: list[Sample] = [decoded(source.read(number)) for number in samples]
        return processor.collate([encode_sample(sample, processor.encoder) for sample in read])  # type: ignore[arg-type, misc]

    timed = Timed()
    trainer = HFTrainer(
        model=model_with_adapter(folder),
        args=TrainingArguments(**arguments(folder, len(order), len(order[0]))),
        train_dataset=[numbers[key] for keys in order for key in keys],  # type: ignore[arg-type]
        data_collator=collate,  # type: ignore[arg-type]
        callbacks=[TrainerMarks(timed)],
    )
    trainer.train()
    return timed


def through_trl(folder: Path, order: Sequence[Sequence[str]]) -> Timed:
    """TRL's trainer over the same samples, with its own collator."""
    from datasets import Dataset, Features, List, Value  # type: ignore[import-not-found]
    from datasets import Image as ImageFeature
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    source = open_source(folder / "chats.jsonl")
    numbers = {source.key(number): number for number in range(len(source))}
    rows = [json.loads(line) for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [rows[numbers[key]] for keys in order for key in keys]
    for row in chosen:
        row["messages"][0]["content"] = row["messages"][0]["content"].removeprefix("<image>")
    message = {"role": Value("string"), "content": Value("string")}
    columns = {
        "messages": [row["messages"] for row in chosen],
        "images": [[str(folder / name) for name in row["images"]] for row in chosen],
    }
    data = Dataset.from_dict(columns, features=Features({"messages": List(message), "images": List(ImageFeature())}))
    timed = Timed()
    trainer = SFTTrainer(
        model=model_with_adapter(folder),
        # TRL recomputes activations if it is not told otherwise; the others do not.
        args=SFTConfig(**arguments(folder, len(order), len(order[0])), max_length=None, gradient_checkpointing=False),
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(folder / "vlm"),
        callbacks=[TrainerMarks(timed)],
    )
    trainer.train()
    return timed


def check(ours: Timed, theirs: Timed) -> None:
    """Stop unless both trained the same: timing different work would mean nothing."""
    for step, (one, other) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        # The adapters start as nothing, and then go their own ways: their inner weights are random.
        if abs(one - other) > (2e-3 if step == 0 else 2e-2):
            raise SystemExit(f"the losses of step {step} differ: {one:.5f} through mmfuse, {other:.5f} through Trainer")


def tokens_of(folder: Path, order: Sequence[Sequence[str]]) -> float:
    """Tokens that the samples of a batch hold on average."""
    source = open_source(folder / "chats.jsonl")
    numbers = {source.key(number): number for number in range(len(source))}
    encoder: Any = AdoptedProcessor(AutoProcessor.from_pretrained(folder / "vlm")).encoder
    return statistics.mean(
        sum(len(encode_sample(source.read(numbers[key]), encoder)) for key in keys) for keys in order
    )


def report(name: str, runs: Sequence[Timed], base: Sequence[Timed] | None = None) -> None:
    def of(timed: Sequence[Timed]) -> tuple[float, float]:
        seconds = [second for one in timed for second in one.seconds]
        samples = sum(len(keys) for one in timed for keys in one.keys[WARM_UP:])
        return statistics.median(seconds), samples / sum(seconds)

    step, speed = of(runs)
    ratio = ""
    if base is not None:
        base_step, base_speed = of(base)
        ratio = f"{step / base_step:8.3f} {speed / base_speed:8.2f}"
    print(f"{name:22}{1000 * step:8.1f} ms {speed:8.1f} samples/s {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, chats=512)
        first = through_mmfuse(folder, WARM_UP, options.batch)
        check(first, through_trainer(folder, first.keys))
        pack_to = max(512, round(tokens_of(folder, first.keys)))
        sides: dict[str, Callable[[Sequence[Sequence[str]]], Timed]] = {
            "transformers.Trainer": lambda order: through_trainer(folder, order)
        }
        if importlib.util.find_spec("trl"):
            sides["trl.SFTTrainer"] = lambda order: through_trl(folder, order)
        runs: dict[str, list[Timed]] = {}
        for _ in range(options.rounds):
            ours = through_mmfuse(folder, options.steps, options.batch)
            runs.setdefault("mmfuse", []).append(ours)
            runs.setdefault(f"mmfuse, packed to {pack_to}", []).append(
                through_mmfuse(folder, options.steps, options.batch, pack_to)
            )
            for name, side in sides.items():
                timed = side(ours.keys)
                timed.keys = ours.keys
                runs.setdefault(name, []).append(timed)
    print(f"{torch.get_num_threads()} threads, batches of {options.batch}; ratios to transformers.Trainer")
    for name, timed_runs in runs.items():
        report(name, timed_runs, runs["transformers.Trainer"])


if __name__ == "__main__":
    main()
