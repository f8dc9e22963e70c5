"""Checkpoints of which every rank writes its part: torch's distributed checkpoints (DCP) without their pickles.

    checkpoints/last.ckpt -> parts/last-120     a symbolic link: replaced in one move, as a file is
    checkpoints/parts/last-120/
        __0_0.distcp, __1_0.distcp, ...         tensors, those of each rank in a file of its own
        tensors.json                            where each tensor lies (DCP pickles this)
        state.pt                                all that is no tensor of the model or the optimizer
        manifest.json                           sizes and checksums of these files; written last

Tensors are cut anew when they are read, so that a run goes on with another number of ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.futures import Future

from mmfuse.errors import ConfigError
from mmfuse.training.disk import CheckpointWriteError, disk_error, flush, write_error

PARTS: Final = "parts"
TENSORS, STATE, MANIFEST = "tensors.json", "state.pt", "manifest.json"

#: What the names of tensors begin with: of a weight, and of what optimizer number 0 keeps for one.
WEIGHT, OPTIMIZER = "weight/", "optimizer/0/"

Result = TypeVar("Result")


class _Writer(FileSystemWriter):
    """DCP's files, and a table of them as JSON."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # DCP sends it to all ranks, and what stands behind an exception does not travel with it.
            if (number := disk_error(error)) is not None:
                raise OSError(number, os.strerror(number)) from error
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), name
            tensors[name] = {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "size": list(tensor.size),
                "chunks": [[list(chunk.offsets), list(chunk.sizes)] for chunk in tensor.chunks],
            }
        places = [
            {
                "tensor": one.index.fqn,
                "offsets": None if one.index.offset is None else list(one.index.offset),
                "index": one.index.index,
                "file": one.storage_data.relative_path,
                "start": one.storage_data.offset,
                "bytes": one.storage_data.length,
            }
            for written in results
            for one in written
        ]
        _write_json(Path(self.path) / TENSORS, {"tensors": tensors, "places": places})


class _Reader(FileSystemReader):
    """Reads what `_Writer` wrote. The tensors themselves DCP reads with `weights_only=True`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        table = read_table(Path(self.path))
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=_dtype(tensor["dtype"])),
                torch.Size(tensor["size"]),
                [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in tensor["chunks"]],
            )
            for name, tensor in table["tensors"].items()
        }
        places = {}
        for place in table["places"]:
            index = MetadataIndex(place["tensor"], place["offsets"], place["index"])
            places[index] = _StorageInfo(place["file"], place["start"], place["bytes"])
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{TENSORS}: {name!r} is no dtype of torch")
    return dtype


def read_table(folder: Path) -> dict[str, Any]:
    """The table of a checkpoint's tensors: `tensors` by name with dtype and size, and the `places` of their pieces."""
    try:
        table: dict[str, Any] = json.loads((folder / TENSORS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: this is no sharded checkpoint, or it is damaged: {error}") from error
    for place in table["places"]:
        if Path(place["file"]).name != place["file"]:
            raise ConfigError(f"{folder}: {TENSORS} names a file outside the folder: {place['file']!r}")
    return table


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
    flush(path)


# Reading


def load_tensors(into: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors, which may be sharded, in place; all ranks together, if there are any.

    Raises:
        ConfigError: a tensor is missing or of another size, or the checkpoint is damaged.
    """
    held = read_table(folder)["tensors"]
    for name, tensor in into.items():
        if name not in held:
            raise ConfigError(f"{folder}: the checkpoint holds no {name}; it is of another model")
        if list(tensor.size()) != held[name]["size"]:
            raise ConfigError(f"{folder}: {name} is {held[name]['size']} there and {list(tensor.size())} here")
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    alone = not dist.is_initialized()
    try:
        load(dict(into), storage_reader=_Reader(folder), planner=planner, no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise ConfigError(f"{folder}: the checkpoint cannot be read, it is damaged: {first}") from error


def fill(into: Mapping[str, Tensor], whole: Mapping[str, Tensor], path: Path) -> None:
    """Fill tensors, which may be sharded, in place from whole ones that every rank has read from the file `path`.

    Raises:
        ConfigError: a tensor is missing, or of another size.
    """
    for name, tensor in into.items():
        if name not in whole or whole[name].size() != tensor.size():
            raise ConfigError(f"{path}: the checkpoint holds no {name} {list(tensor.size())}; it is of another model")
        tensor.copy_(cut_like(tensor, whole[name]))


def cut_like(like: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of `whole`, cut as `like` is; all of it where that is not cut or of another size."""
    if not isinstance(like, DTensor) or like.size() != whole.size():
        return whole.clone()
    # Every rank has read the file: nothing is sent.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def folder_damage(folder: Path) -> str | None:
    """What is wrong with a sharded checkpoint, or None if every file of it is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, checksum) in manifest.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes and not {size}"
            if _checksum(folder / name) != checksum:
                return f"the checksum of {name} does not match"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return str(error) or type(error).__name__
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


# Writing


def save_sharded(tensors: Mapping[str, Tensor], state: Mapping[str, Any], target: Path, earlier: Path | None) -> None:
    """Write a checkpoint, all ranks together.

    Args:
        tensors: by name; sharded ones, and plain ones that are the same on all ranks.
        state: all the rest: plain values. That of rank 0 is written.
        target: becomes a link to the new folder.
        earlier: becomes what `target` was; None keeps nothing.

    Raises:
        CheckpointWriteError: on all ranks, if one of them cannot write. What was there before is untouched.
    """
    main = dist.get_rank() == 0
    before = "; the one before is untouched" if target.exists() else ""
    folder = Path(_together(lambda: str(_new_folder(target, state["global_step"])) if main else "", target, before)[0])
    try:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        _together(lambda: save(dict(tensors), storage_writer=_Writer(folder), planner=planner), target, before)
        sums = _together(lambda: _sums(folder, f"__{dist.get_rank()}_*"), target, before)
        _together(lambda: _finish(folder, state, sums) if main else None, target, before)
        _together(lambda: _commit(folder, target, earlier) if main else None, target, before)
    except BaseException:
        if main and not (target.is_symlink() and target.resolve() == folder.resolve()):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _together(do: Callable[[], Result], target: Path, before: str) -> list[Result]:
    """Do something on each rank and return what all of them returned; if it fails on one, fail on all."""
    result: Result | None = None
    failure: CheckpointWriteError | None = None
    try:
        result = do()
    except (Exception, CheckpointException) as error:  # DCP's is no `Exception`
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        failure = write_error(target, error, before) or CheckpointWriteError(
            f"{target} cannot be written: {reason}{before}"
        )
        failure.__cause__ = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for _, message in outcomes:
        if message is not None:
            raise CheckpointWriteError(message)
    return [one for one, _ in outcomes]


def _new_folder(target: Path, step: int) -> Path:
    parts = target.parent / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = parts / f"{target.stem}-{step}{f'-{number}' if number else ''}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def _sums(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Size and checksum of the files that match."""
    return {path.name: (path.stat().st_size, _checksum(path)) for path in sorted(folder.glob(pattern))}


def _finish(folder: Path, state: Mapping[str, Any], sums: list[dict[str, tuple[int, int]]]) -> None:
    torch.save(dict(state), folder / STATE)
    flush(folder / STATE)
    manifest = {name: one for part in sums for name, one in part.items()}
    _write_json(folder / MANIFEST, manifest | _sums(folder, TENSORS) | _sums(folder, STATE))
    flush(folder)


def _commit(folder: Path, target: Path, earlier: Path | None) -> None:
    """Make `target` name the new folder. There is no moment in which it names nothing, or half of one."""
    flush(folder.parent)
    if earlier is not None and target.is_symlink():
        _point(earlier, target.readlink())
    _point(target, folder.relative_to(target.parent))
    flush(target.parent)
    sweep_parts(target.parent)


def _point(link: Path, to: Path) -> None:
    scratch = link.with_name(f".{link.name}.tmp")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(to)
    os.replace(scratch, link)


def sweep_parts(folder: Path) -> None:
    """Remove the parts that no link in `folder` names: replaced checkpoints, and what killed writes have left."""
    named = {link.resolve() for link in folder.glob("*") if link.is_symlink()}
    for part in (folder / PARTS).glob("*"):
        if part.resolve() not in named:
            shutil.rmtree(part, ignore_errors=True)
