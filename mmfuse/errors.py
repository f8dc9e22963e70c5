"""Messages for the mistakes that people make most: a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config asks for something that does not exist or cannot be combined."""


class DataError(ValueError):
    """A file or sample cannot be used; the message names it and what was expected."""


class SourceError(DataError):
    """A file that many samples come from cannot be trusted: no matter of one sample, which could be left out."""


class RunError(RuntimeError):
    """A run cannot go on, and the program is not to blame; the message says why and what to do."""


class StoppedError(RunError):
    """A run was asked to stop by a signal and has saved its state; the message says where, and how it goes on."""

    #: What a process killed by SIGTERM has in a shell; launchers and schedulers know it.
    exit_code = 143


def unknown(kind: str, name: object, options: Iterable[str]) -> str:
    """Say that `name` is no known `kind`, what was probably meant, and what there is.

    >>> unknown("fusion", "mmaa", ["causal", "mma"])
    "unknown fusion 'mmaa': did you mean 'mma'? Known: causal, mma"
    """
    known = sorted(options)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f": did you mean {close[0]!r}?" if close else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"


def check_keys(where: str, given: Iterable[str], options: Iterable[str]) -> None:
    """Raise `ConfigError` for the first key in `given` that is not in `options`."""
    known = list(options)
    for key in given:
        if key not in known:
            raise ConfigError(unknown(f"key in {where}", key, known))
