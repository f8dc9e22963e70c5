"""What a command leaves behind of the processes that Lightning made it one of: nothing."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from typing import Final

import torch

from mmfuse.errors import StoppedError

#: What tells a process that it is a rank, and where the others are.
_OF_RANKS: Final = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def leaving_nothing(act: Callable[[], object]) -> None:
    """Do something; restore the environment behind it, and leave the process group unless it failed.

    Where a rank fails, others may be inside a collective with it, which leaving would wait for.
    """
    before = {name: os.environ.get(name) for name in _OF_RANKS}
    end: StoppedError | SystemExit | None = None
    try:
        act()
    except StoppedError as stopped:
        end = StoppedError(*stopped.args)  # without the frames of the other, which hold the trainer
    except SystemExit as stopped:
        end = SystemExit(stopped.code)
    finally:
        _restore(before)
    _leave_process_group()
    if end is not None:
        raise end


def _restore(before: Mapping[str, str | None]) -> None:
    """Undo what Lightning's launcher has written: who inherits it would take itself for a rank, and await the others.

    Args:
        before: values by name; None where there was none.
    """
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _leave_process_group() -> None:
    """End the threads of the process group while Python is whole, if there is one.

    Lightning leaves a gloo group to the end of the process. There a thread that lets go of a tensor meets an
    interpreter which is shutting down, and now and then aborts a rank that has finished its work.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # the trainer and the model's wrapper know each other, and hold the group
        torch.distributed.destroy_process_group()
