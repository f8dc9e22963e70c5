"""The table of tasks: which scorer a task has, by which protocols, what its rows hold, and where its data come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmfuse.errors import ConfigError, DataError, unknown
from mmfuse.eval.scorers.exact import exact_match
from mmfuse.eval.scorers.records import Result, Row, identity

#: A scorer: rows and the name of a protocol to a result. It is pure: the same rows give the same result.
Scorer = Callable[[Sequence[Row], str], Result]

#: The benchmark's own rules, those of lmms-eval, and those of VLMEvalKit.
PROTOCOLS = ("official", "lmms", "vlmevalkit")


@dataclass(frozen=True)
class TaskScorer:
    """How a task is scored.

    Attributes:
        name: of the task.
        score: the scorer.
        primary: the metric that is quoted.
        fields: that every row must have beside `id`, `prediction` and `target`.
        optional: fields that are read where they are there.
        protocols: that the scorer knows; the first one is the default.
        target: what `target` holds.
        prediction: what `prediction` holds, if it is no text.
        data: where the data come from.
        licence: of the data, as their owners state it; "unknown" if they state none.
        paper: that defines the task, as an arXiv number or a title.
        aliases: other names of the task.
        judged: the official score needs a judge model, so that without one the task has other metrics.
    """

    name: str
    score: Scorer
    primary: str
    fields: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ("official",)
    target: str = "the right answer"
    prediction: str = "text"
    data: str = ""
    licence: str = "unknown"
    paper: str = ""
    aliases: tuple[str, ...] = ()
    judged: bool = False


_ENTRIES: tuple[TaskScorer, ...] = (
    TaskScorer(
        "exact_match",
        exact_match,
        "exact_match",
        optional=("category", "image", "cluster"),
        target="the right answer, or a list of them",
        data="any",
        licence="that of your data",
    ),
)

#: All tasks by name.
SCORERS: dict[str, TaskScorer] = {entry.name: entry for entry in _ENTRIES}
_ALIASES = {alias: entry.name for entry in _ENTRIES for alias in entry.aliases}


def find_scorer(name: str) -> TaskScorer:
    """The entry of a task, by its name or an alias; case does not matter, and `-` is `_`.

    Raises:
        ConfigError: there is no such task.
    """
    plain = name.lower().replace("-", "_")
    plain = _ALIASES.get(plain, plain)
    if plain not in SCORERS:
        raise ConfigError(unknown("task", name, SCORERS))
    return SCORERS[plain]


def score_rows(task: str, rows: Sequence[Row], protocol: str | None = None) -> Result:
    """Score the rows of a task.

    Args:
        task: its name, see `SCORERS`.
        rows: `id`, `prediction`, `target` and the fields of the task.
        protocol: whose rules; the task's first one if not given.

    Raises:
        ConfigError: an unknown task, or a protocol that the task does not have.
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
    return entry.score(rows, protocol)
