"""Reading at an offset from files that were looked at before, in any process."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mmfuse.data.decoders import Budget
from mmfuse.errors import SourceError

#: Of one pool and process: well below the usual limit of 1024, however many shards a source has.
MAX_OPEN: Final = 64


def read_whole(path: Path, what: str, key: str, budget: Budget) -> bytes:
    """Read a file that is no larger than the budget allows.

    Args:
        path: the file.
        what: it is, such as `image`.
        key: of its sample, for messages.
        budget: its limit of bytes.

    Raises:
        DataError: it is larger; nothing was read.
        FileNotFoundError, OSError: naming file and sample; the error number stays, as some failures are tried again.
    """
    try:
        budget.check("bytes", path.stat().st_size, f"{key}, {path}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: there is no {what} {path}") from error
    except OSError as error:
        raise OSError(error.errno, f"{key}: cannot read the {what} {path}: {error.strerror}") from error


class _Handle:
    """A file descriptor that lives as long as somebody reads from it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class FilePool:
    """Files opened on first use and read with `pread`, which knows no common position.

    Forked processes may thus share the descriptors, and pickling leaves them behind: the copy opens its own.

    Args:
        paths: the files; `read` names them by number.

    Attributes:
        sizes: of the files in bytes, when the pool was made.
        times: of their last changes, in nanoseconds.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        stats = [path.stat() for path in self.paths]
        self.sizes = tuple(stat.st_size for stat in stats)
        self.times = tuple(stat.st_mtime_ns for stat in stats)
        self._open: OrderedDict[int, _Handle] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return up to `size` bytes; fewer at the end of the file.

        Raises:
            SourceError: the file is another one than when the pool was made.
            OSError: it cannot be read.
        """
        handle = self._open.pop(number, None) or self._opened(number)
        self._open[number] = handle
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        data = os.pread(handle.fd, size, offset)
        while len(data) < size and (more := os.pread(handle.fd, size - len(data), offset + len(data))):
            data += more
        return data

    def close(self) -> None:
        """Close what is open; a later `read` opens it again."""
        self._open.clear()

    def _opened(self, number: int) -> _Handle:
        handle = _Handle(self.paths[number])
        stat = os.fstat(handle.fd)
        if (stat.st_size, stat.st_mtime_ns) != (self.sizes[number], self.times[number]):
            raise SourceError(f"{self.paths[number]} has changed since it was indexed; start again to read the new one")
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}
