"""Checkpoints that are whole or absent, and never run code when they are read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mmfuse.errors import ConfigError

FOLDER = "checkpoints"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, and renames.

    Lightning goes through a temporary file in the system's own folder; where that lies on another disk the last move is
    a copy, and a kill in its middle destroys the only checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.tmp")
        with open(scratch, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location=map_location)


def read_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """`torch.load` of tensors and plain values, which is all that checkpoints of mmfuse hold: others may run code.

    Raises:
        ConfigError: the file holds something else, or is damaged.
    """
    try:
        loaded: dict[str, Any] = torch.load(path, weights_only=True, **options)
    except (FileNotFoundError, PermissionError):
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ConfigError(f"{path}: this is no checkpoint of tensors and plain values, or it is damaged") from error
    return loaded


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`, which remembers its own score: `last.ckpt` is written before the validation of the same step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = str(Path(str(self.dirpath)) / "best.ckpt")
        if trainer.ckpt_path and Path(path).exists():
            held = read_checkpoint(path, map_location="cpu", mmap=True)["callbacks"][self.state_key]
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = held["best_model_score"]
            self.best_k_models = {path: held["best_model_score"]}


def checkpoint_callbacks(run: Path, every_n_steps: int) -> list[ModelCheckpoint]:
    """`last.ckpt` after every so many steps, and `best.ckpt` by exact match on the validation data."""
    shared: dict[str, Any] = {"dirpath": run / FOLDER, "enable_version_counter": False, "save_top_k": 1}
    last = ModelCheckpoint(filename="last", every_n_train_steps=every_n_steps, **shared)
    best = BestCheckpoint(
        filename="best", monitor="val/exact_match", mode="max", save_on_train_epoch_end=False, **shared
    )
    return [best, last]


def resolve_checkpoint(name: str | None, run: Path) -> Path | None:
    """The file that `--ckpt_path` names: `last`, `best`, or a path.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if name is None:
        return None
    path = run / FOLDER / f"{name}.ckpt" if name in ("last", "best") else Path(name)
    if not path.is_file():
        there = sorted(file.name for file in (run / FOLDER).glob("*.ckpt"))
        found = f"{run / FOLDER} holds {', '.join(there)}" if there else f"{run / FOLDER} holds no checkpoint"
        raise FileNotFoundError(f"--ckpt_path {name}: no checkpoint at {path}; {found}")
    return path


def load_network_weights(path: Path, module: LightningModule) -> None:
    """Load the weights of a Lightning checkpoint into a `MultimodalModule`, or what it trains of them.

    Raises:
        ConfigError: it does not belong to this model.
    """
    checkpoint = read_checkpoint(path, map_location="cpu")
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
