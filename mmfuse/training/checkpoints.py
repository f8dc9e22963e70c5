"""Checkpoints that are whole or absent, and never run code when they are read."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.tensor import DTensor

from mmfuse.errors import ConfigError
from mmfuse.training.disk import flush, write_error
from mmfuse.training.sharded_files import STATE, WEIGHT, fill, folder_damage, load_tensors, sweep_parts

FOLDER: Final = "checkpoints"
#: `last` is the newest state, `previous` the `last` before it, `best` the best on validation data.
LAST, PREVIOUS, BEST = "last", "previous", "best"

#: What file systems say that give a file only one name: there, `previous` is not kept.
_NO_SECOND_NAMES: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, and renames; a `last` that is replaced is kept as `previous`.

    Lightning goes through a temporary file in the system's own folder; where that lies on another disk the last move is
    a copy, and a kill in its middle destroys the only checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            CheckpointWriteError: the disk is full or fails, or the file may not be so large.
        """
        target = Path(path)
        scratch = target.with_name(f".{target.name}.tmp")
        there = "; the one before is untouched" if target.exists() else ""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(scratch, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.stem == LAST:
                _keep(target, target.with_stem(PREVIOUS))
            os.replace(scratch, target)
            there = "; it is whole, but a power cut could still undo it"
            flush(target.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            if (failure := write_error(target, error, there)) is not None:
                raise failure from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read the checkpoint at `path`.

        Raises:
            ConfigError: it holds something else, is damaged, or sharded.
        """
        if Path(path).is_dir():
            raise ConfigError(
                f"{path} is sharded: go on with --trainer.strategy fsdp2, on any number of ranks. Without it, its "
                "weights can be tested and exported, and a new run started from model/"
            )
        return read_checkpoint(path, map_location=map_location)


def _keep(current: Path, earlier: Path) -> None:
    """Give `current` a second name. There is no moment without a whole file under either."""
    scratch = earlier.with_name(f".{earlier.name}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        os.link(current, scratch)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in _NO_SECOND_NAMES:
            raise
        return
    os.replace(scratch, earlier)


def sweep(folder: Path) -> None:
    """Remove what writes that were killed have left behind."""
    for scratch in folder.glob(".*.tmp"):
        scratch.unlink(missing_ok=True)
    sweep_parts(folder)


def read_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """`torch.load` of tensors and plain values, which is all that checkpoints of mmfuse hold: others may run code.

    Of a sharded checkpoint only what is not sharded: all but the tensors of the model and the optimizer.

    Raises:
        ConfigError: the file holds something else, or is damaged.
    """
    file = Path(path) / STATE if Path(path).is_dir() else Path(path)
    try:
        loaded: dict[str, Any] = torch.load(file, weights_only=True, **options)
    except (FileNotFoundError, PermissionError):
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ConfigError(f"{path}: this is no checkpoint of tensors and plain values, or it is damaged") from error
    return loaded


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every record of it is as it was written.

    torch reads archives without comparing checksums, so that a flipped bit in a weight would go unnoticed.
    """
    if path.is_dir():
        return folder_damage(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return None if broken is None else f"the checksum of {broken} does not match"


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`, which remembers its own score: `last.ckpt` is written before the validation of the same step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = str(Path(str(self.dirpath)) / f"{BEST}.ckpt")
        if trainer.ckpt_path and Path(path).exists():
            held = read_checkpoint(path, map_location="cpu", mmap=True)["callbacks"][self.state_key]
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = held["best_model_score"]
            self.best_k_models = {path: held["best_model_score"]}


def last_path(run: Path) -> Path:
    """The newest state of a run."""
    return run / FOLDER / f"{LAST}.ckpt"


def checkpoint_callbacks(run: Path, every_n_steps: int) -> list[ModelCheckpoint]:
    """`last.ckpt` after every so many steps, and `best.ckpt` by exact match on the validation data."""
    shared: dict[str, Any] = {"dirpath": run / FOLDER, "enable_version_counter": False, "save_top_k": 1}
    last = ModelCheckpoint(filename=LAST, every_n_train_steps=every_n_steps, **shared)
    best = BestCheckpoint(filename=BEST, monitor="val/exact_match", mode="max", save_on_train_epoch_end=False, **shared)
    return [best, last]


def resolve_checkpoint(name: str | None, run: Path) -> Path | None:
    """The file that `--ckpt_path` names: `last`, `previous`, `best`, or a path.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ConfigError: it is damaged; the message names another one of the run that is whole.
    """
    if name is None:
        return None
    named = name in (LAST, PREVIOUS, BEST)
    path = run / FOLDER / f"{name}.ckpt" if named else Path(name)
    others = [other for other in (LAST, PREVIOUS, BEST) if other != name]
    if not path.exists():
        there = sorted(file.name for file in (run / FOLDER).glob("*.ckpt"))
        found = f"{run / FOLDER} holds {', '.join(there)}" if there else f"{run / FOLDER} holds no checkpoint"
        raise FileNotFoundError(f"--ckpt_path {name}: no checkpoint at {path}; {found}")
    # A sharded checkpoint is as large as all ranks together can hold: one of them reads it through.
    checks = named and (path.is_file() or getattr(rank_zero_only, "rank", 0) == 0)
    if checks and (wrong := damage(path)) is not None:
        raise ConfigError(f"--ckpt_path {name}: {path} is damaged: {wrong}; {_whole(run, others)}")
    return path


def _whole(run: Path, names: list[str]) -> str:
    """Which of the checkpoints a run can go on from."""
    for name in names:
        path = run / FOLDER / f"{name}.ckpt"
        if path.exists() and damage(path) is None:
            step = read_checkpoint(path, map_location="cpu", mmap=True).get("global_step")
            return f"{path.name} is whole, of step {step}: --ckpt_path {name}"
    return "no other checkpoint of the run is whole"


def load_network_weights(path: Path, module: LightningModule) -> None:
    """Load the weights of a checkpoint into a `MultimodalModule`, or what it trains of them.

    The checkpoint is a file or sharded, the module on one rank or cut over all.

    Raises:
        ConfigError: it does not belong to this model.
    """
    state = module.state_dict()
    if path.is_dir():
        load_tensors({WEIGHT + name: tensor for name, tensor in state.items()}, path)
    elif any(isinstance(tensor, DTensor) for tensor in state.values()):
        fill(state, read_checkpoint(path, map_location="cpu", mmap=True)["state_dict"], path)
    else:
        checkpoint = read_checkpoint(path, map_location="cpu")
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
