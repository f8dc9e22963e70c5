"""How a task is scored: the scorer, its protocols, and what its rows hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mmfuse.eval.scorers.records import Result, Row

#: A scorer: rows and the name of a protocol to a result. It is pure: the same rows give the same result. One whose task
#: has `resources` takes them, too, by name.
Scorer = Callable[..., Result]

#: The benchmark's own rules, those of lmms-eval, and those of VLMEvalKit.
PROTOCOLS = ("official", "lmms", "vlmevalkit")


@dataclass(frozen=True)
class Judge:
    """How a judge model is asked about a row. No judge is called here: requests are exported, answers imported.

    Attributes:
        prompt: from a row and `resources` to the request; None if the row needs none.
        resources: files of the benchmark that the request needs, by name, and where they are.
        field: of the row into which the answer goes.
        protocols: that read it.
    """

    prompt: Callable[[Row, Mapping[str, str]], str | None]
    resources: Mapping[str, str]
    field: str = "judgement"
    protocols: tuple[str, ...] = ("official", "substitute")


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
        resources: files of the benchmark that scoring needs (such as lists of words), by name, and where they are.
        takes_resources: some protocol needs a file, so that the scorer is given them all and says what is missing.
        data: where the data come from.
        licence: of the data, as their owners state it; "unknown" if they state none.
        paper: that defines the task, as an arXiv number or a title.
        aliases: other names of the task.
        judge: how a judge model is asked, if the official score needs one.
    """

    name: str
    score: Scorer
    primary: str
    fields: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ("official",)
    target: str = "the right answer"
    prediction: str = "text"
    resources: Mapping[str, str] = field(default_factory=dict)
    takes_resources: bool = False
    data: str = ""
    licence: str = "unknown"
    paper: str = ""
    aliases: tuple[str, ...] = ()
    judge: Judge | None = None

    @property
    def judged(self) -> bool:
        """Whether the official score needs a judge model, so that without one the task has other metrics or none."""
        return self.judge is not None
