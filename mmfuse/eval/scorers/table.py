"""The table of tasks: which scorer a task has, by which protocols, what its rows hold, and where its data come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmfuse.errors import ConfigError, DataError, unknown
from mmfuse.eval.scorers.catalogue import ENTRIES, REFUSED
from mmfuse.eval.scorers.records import Result, Row, identity
from mmfuse.eval.scorers.task import PROTOCOLS, Scorer, TaskScorer

__all__ = ["PROTOCOLS", "SCORERS", "Scorer", "TaskScorer", "find_scorer", "score_rows"]

#: All tasks by name.
SCORERS: dict[str, TaskScorer] = {entry.name: entry for entry in ENTRIES}
_ALIASES = {alias: entry.name for entry in SCORERS.values() for alias in entry.aliases}


def find_scorer(name: str) -> TaskScorer:
    """The entry of a task, by its name or an alias; case does not matter, and `-` is `_`.

    Raises:
        ConfigError: there is no such task.
    """
    plain = name.lower().replace("-", "_")
    plain = _ALIASES.get(plain, plain)
    if plain in REFUSED:
        raise ConfigError(f"{name} is not computed here: {REFUSED[plain]}")
    if plain not in SCORERS:
        raise ConfigError(unknown("task", name, SCORERS))
    return SCORERS[plain]


def score_rows(
    task: str, rows: Sequence[Row], protocol: str | None = None, resources: Mapping[str, str] | None = None
) -> Result:
    """Score the rows of a task.

    Args:
        task: its name, see `SCORERS`.
        rows: `id`, `prediction`, `target` and the fields of the task.
        protocol: whose rules; the task's first one if not given.
        resources: the text of each file that the task needs beside the rows, by the names in its entry.

    Raises:
        ConfigError: an unknown task, or a protocol that the task does not have, or a resource that is missing.
        DataError: no rows, an id that occurs twice, a field that is missing or holds something else than expected.
    """
    entry = find_scorer(task)
    protocol = entry.protocols[0] if protocol is None else protocol
    if protocol not in entry.protocols:
        raise ConfigError(f"task {entry.name}: {unknown('protocol', protocol, entry.protocols)}")
    if not rows:
        raise DataError(f"task {entry.name}: there are no rows to score")
    seen: set[str] = set()
    for row in rows:
        own = identity(row)
        if own in seen:
            raise DataError(f"task {entry.name}: the id {own!r} occurs twice")
        seen.add(own)
        for key in ("prediction", *entry.fields):
            if row.get(key) is None:
                raise DataError(f"task {entry.name}, row {own}: the field {key!r} is missing")
    if not (entry.resources or entry.takes_resources):
        return entry.score(rows, protocol)
    given = resources or {}
    for name, source in entry.resources.items():
        if name not in given:
            raise ConfigError(f"task {entry.name} needs the resource {name!r}: {source}")
    return entry.score(rows, protocol, given)
