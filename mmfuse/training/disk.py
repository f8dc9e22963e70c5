"""Writing to disks that fill up, fail and lose power."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from torch.distributed.checkpoint.api import CheckpointException

from mmfuse.errors import RunError

_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointWriteError(RunError):
    """A checkpoint cannot be written; the one before is untouched."""


def write_error(target: Path, error: BaseException, state: str) -> CheckpointWriteError | None:
    """What to tell the user of a write that failed; None if the disk is not to blame.

    Args:
        target: the file or folder that was to be written.
        error: what was raised.
        state: what is there now, to go on the sentence.
    """
    number = disk_error(error)
    if number is None:
        return None
    advice = "Make room and c" if number in _DISK_FULL else "C"
    return CheckpointWriteError(
        f"{target} cannot be written: {os.strerror(number)}{state}. {advice}ontinue with --ckpt_path last"
    )


def disk_error(error: BaseException | None) -> int | None:
    """The number of the failed write behind `error`; torch's writer fails once more when it closes what is cut off."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if isinstance(error, CheckpointException):
            return next((number for one, _ in error.failures.values() if (number := disk_error(one))), None)
        error = error.__cause__ or error.__context__
    return None


def flush(path: Path) -> None:
    """Flush what was written to a file to the disk; of a folder its names, so that a rename survives a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
