"""Faults of checkpoints and of the disk that they lie on."""

from __future__ import annotations

import resource
import struct
import zipfile
from pathlib import Path

from mmfuse.errors import ConfigError
from mmfuse.training.chaos.bench import PATIENCE, Bench, Outcome, saved_step
from mmfuse.training.checkpoints import damage, last_path, resolve_checkpoint


def kill_in_save(bench: Bench, name: str) -> Outcome:
    """Four times, each in a later run of the same folder."""
    run = bench.out / name
    scratch = last_path(run).with_name(f".{last_path(run).name}.tmp")
    made = 0
    for _ in range(4):
        trial = bench.start(name, every=1)
        if not trial.reach(lambda: scratch.exists() and last_path(run).exists()):
            break
        trial.kill()
        made += 1
        if (wrong := damage(last_path(run))) is not None:
            return Outcome(False, f"last.ckpt is damaged after {made} kills: {wrong}")
    return Outcome(made > 0, f"{made} kills, the checkpoint is whole each time")


def full_disk(bench: Bench, name: str) -> Outcome:
    """The system refuses to let files grow, as a full disk does."""
    half = bench.steps // 2
    run = bench.finish(name, steps=half)
    limit = last_path(run).stat().st_size // 2

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    code = bench.start(name, every=1, before=small_files).wait(PATIENCE)
    step, wrong = saved_step(run)
    return Outcome(code == 1 and step == half, wrong or f"exit code {code}, last.ckpt of step {step} is whole")


def flipped_bit(bench: Bench, name: str) -> Outcome:
    """In the newest of several checkpoints."""
    run = bench.finish(name, every=max(1, bench.steps // 4))
    flip_bit(last_path(run))
    try:
        resolve_checkpoint("last", run)
    except ConfigError as error:
        return Outcome("previous.ckpt is whole" in str(error), str(error))
    return Outcome(False, "the damaged checkpoint was accepted")


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of the largest record of a checkpoint (the padding between records means nothing)."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    with path.open("r+b") as file:
        file.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        at = record.header_offset + 30 + name + extra + record.file_size // 2
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
