"""Samples that cannot be used: each is written down with its reason, and too many of them end the run.

A failure that will come again (a damaged image, a text without its image, a bad record) is a matter of the sample: it
is left out everywhere and always, so that two runs over the same data leave out the same. A failure of reading is a
matter of the machine: it is tried again, and then ends the run, because a sample that is missing in one run and there
in the next would make them two different ones.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from mmfuse.errors import ConfigError, DataError, RunError, SourceError

T = TypeVar("T")

#: The file in a run's folder.
QUARANTINE: Final = "quarantine.jsonl"

#: Failed reads that may succeed a moment later: a network file system, a disk under load.
TRANSIENT: Final = frozenset(
    {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET}
)


class TooManyBadSamplesError(RunError):
    """A source has more samples that cannot be used than its limit allows."""


@dataclass(frozen=True)
class BadSampleLimit:
    """How many samples of a source may be bad: both limits must be passed before a run ends.

    Attributes:
        share: of the samples read so far.
        count: so many are always allowed, so that the first bad sample of a long run does not end it.
    """

    share: float = 0.01
    count: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"the share of bad samples lies in 0..1, got {self.share}")
        if self.count < 0:
            raise ConfigError(f"the count of bad samples is 0 or more, got {self.count}")


class Quarantine:
    """Counts what was read, and appends what cannot be used to a file: one JSON object a line.

    A line is `{"source": "captions", "key": "train-0001.tar:000012", "reason": "..."}`. A sample is written once,
    however often it is met. Worker processes append to the same file: lines are short and written at once.

    Args:
        path: the file; None keeps only the counts.
        limit: of each source.
    """

    def __init__(self, path: Path | None, limit: BadSampleLimit = BadSampleLimit()) -> None:
        self.path = path
        self.limit = limit
        self.read: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        #: Where a worker process says what it reads, for the message about one that hangs; shared memory.
        self.notes: Any = None
        self._written: set[tuple[str, str]] = set()

    def attempt(self, source: str, key: str, make: Callable[[], T]) -> T | None:
        """What `make` returns, or None if the sample cannot be used, which is then on record.

        Raises:
            TooManyBadSamplesError: the source is over its limit.
            SourceError: a whole file cannot be trusted.
            OSError: reading fails again and again.
        """
        self.read[source] += 1
        return self.check(source, key, make)

    def check(self, source: str, key: str, make: Callable[[], T]) -> T | None:
        """As `attempt`, for a further step with a sample that was counted as read before."""
        if self.notes is not None:
            self.notes.value = f"{source}/{key}".encode()[: len(self.notes) - 1]
        try:
            return make()
        except SourceError:
            raise
        except (DataError, FileNotFoundError) as error:
            self.add(source, key, str(error))
            return None

    def add(self, source: str, key: str, reason: str) -> None:
        """Record one sample that cannot be used.

        Raises:
            TooManyBadSamplesError: the source is over its limit.
        """
        self.bad[source] += 1
        if (source, key) not in self._written:
            self._written.add((source, key))
            self._append({"source": source, "key": key, "reason": reason})
        bad, read = self.bad[source], max(self.read[source], self.bad[source])
        # A source without a single good sample would be read for ever.
        if bad > self.limit.count and (bad > self.limit.share * read or bad == read):
            where = f", see {self.path}" if self.path is not None else ""
            raise TooManyBadSamplesError(
                f"{bad} of the {read} samples read from {source!r} cannot be used, more than {self.limit.share:.2%} "
                f"and more than {self.limit.count}{where}. The last one: {reason}"
            )

    def _append(self, entry: dict[str, str]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(number, line)
        finally:
            os.close(number)


def read_quarantine(path: Path) -> list[dict[str, str]]:
    """The entries of a quarantine file, without repeats of resumed runs and of several workers."""
    entries: dict[tuple[str, str], dict[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        entries.setdefault((entry["source"], entry["key"]), entry)
    return list(entries.values())


def retried(read: Callable[[], T], where: str, *, tries: int = 5, wait: float = 0.1) -> T:
    """Read, and read again after a failure that may pass.

    Args:
        read: reads.
        where: names what is read in messages.
        tries: in all.
        wait: seconds before the second try; doubled each time.

    Raises:
        OSError: the last failure, or the first one that does not pass by itself.
    """
    for attempt in range(1, tries + 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            if attempt == tries:
                raise OSError(error.errno, f"{where}: {tries} attempts to read failed: {error.strerror}") from error
            time.sleep(wait * 2 ** (attempt - 1))
    raise AssertionError("unreachable")
