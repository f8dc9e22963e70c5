"""Launches that were measured on a GPU; they stand in a file of the user's cache, and go before the table of launch.py.

Only `mmfuse kernels --tune` measures. Nothing is measured while a model runs: another launch sums in another order, and
a config should give the same bits twice. The file is read anew when it has changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from mmfuse import __version__
from mmfuse.errors import RunError
from mmfuse.kernels.triton.launch import Launch, padded
from mmfuse.paths import cache_directory

#: How far results of two launches may lie apart, as a share of the larger norm: a rounding to 16 bits is 2⁻⁸.
_SAME = 1e-2


@dataclass(frozen=True)
class Trial:
    """One launch of a kernel: its median time in milliseconds, or why it has none."""

    launch: Launch
    time: float | None
    problem: str | None = None


def try_launches(
    candidates: Iterable[Launch],
    run: Callable[[Launch], Sequence[Tensor]],
    time: Callable[[Callable[[], Any]], float],
) -> list[Trial]:
    """Time each candidate that compiles and gives the numbers that the first one gives.

    Args:
        candidates: the first is the table's.
        run: computes with a launch.
        time: the median time of a call, in milliseconds.
    """
    trials: list[Trial] = []
    expected: Sequence[Tensor] | None = None
    for launch in candidates:
        try:
            found = run(launch)
        except (OutOfResources, PTXASError, CompilationError) as error:
            trials.append(Trial(launch, None, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        expected = found if expected is None else expected
        if all(_same(x, y) for x, y in zip(found, expected, strict=True)):
            trials.append(Trial(launch, time(partial(run, launch))))
        else:
            trials.append(Trial(launch, None, "it gives other numbers than the table's launch"))
    return trials


def fastest(trials: Iterable[Trial]) -> Launch | None:
    """The launch of the shortest time; None if none ran."""
    timed = [(trial.time, trial.launch) for trial in trials if trial.time is not None]
    return min(timed)[1] if timed else None


def tuned_launch(kernel: str, head_dim: int, itemsize: int, gpu: str, file: Path | None = None) -> Launch | None:
    """The launch kept for a kernel on this GPU under these versions; None if it was never measured.

    Raises:
        RunError: the file holds something else.
    """
    file = launches_file() if file is None else file
    try:
        changed = file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return _read(file, changed).get(_machine(gpu), {}).get(_case(kernel, head_dim, itemsize))


def keep(kernel: str, head_dim: int, itemsize: int, gpu: str, launch: Launch, file: Path | None = None) -> Path:
    """Write a launch into the file, beside those that are there, and return its path."""
    file = launches_file() if file is None else file
    known = {gpu: dict(cases) for gpu, cases in _read(file, -1).items()} if file.exists() else {}
    known.setdefault(_machine(gpu), {})[_case(kernel, head_dim, itemsize)] = launch
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    part.replace(file)
    _read.cache_clear()
    return file


def launches_file() -> Path:
    """Where launches are kept."""
    return cache_directory() / "launches.json"


@lru_cache(maxsize=4)
def _read(file: Path, changed: int) -> Mapping[str, Mapping[str, Launch]]:
    try:
        machines = json.loads(file.read_text())
        return {
            machine: {case: Launch(*(int(number) for number in numbers)) for case, numbers in cases.items()}
            for machine, cases in machines.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(
            f"{file}: expected launches by GPU and kernel, as `mmfuse kernels --tune` writes them ({error}). "
            "It can be removed: without it the built-in launches are used"
        ) from error


def _machine(gpu: str) -> str:
    return f"{gpu}, triton {triton.__version__}, mmfuse {__version__}"


def _case(kernel: str, head_dim: int, itemsize: int) -> str:
    return f"{kernel} {max(64, padded(head_dim))} x {itemsize} bytes"


def _same(x: Tensor, y: Tensor) -> bool:
    x, y = (torch.nan_to_num(each.double(), posinf=0.0, neginf=0.0) for each in (x, y))
    return bool((x - y).norm() <= _SAME * torch.maximum(x.norm(), y.norm()))
