"""The table of tasks: which scorer a task has, by which protocols, what its rows hold, and where its data come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmfuse.errors import ConfigError, DataError, unknown
from mmfuse.eval.scorers.documents import anls, chartqa
from mmfuse.eval.scorers.exact import exact_match
from mmfuse.eval.scorers.records import Result, Row, identity
from mmfuse.eval.scorers.vqa import evalai_people, gqa, textvqa, vqav2

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

_IMAGE = ("image", "cluster", "category")

_SHORT_ANSWERS = (
    TaskScorer("vqav2", vqav2, "accuracy", (), (*_IMAGE, "answer_type"), PROTOCOLS, "ten answers",
        data="visualqa.org, images of COCO", licence="CC-BY-4.0 (annotations)", paper="1612.00837",
        aliases=("vqa_v2", "vqa")),
    TaskScorer("textvqa", textvqa, "accuracy", (), _IMAGE, PROTOCOLS, "ten answers",
        data="textvqa.org, images of Open Images", licence="CC-BY-4.0", paper="1904.08920", aliases=("textvqa_val",)),
    TaskScorer("vizwiz", evalai_people, "accuracy", (), (*_IMAGE, "answer_type"), PROTOCOLS, "ten answers",
        data="vizwiz.org", licence="CC-BY-4.0", paper="1802.08218", aliases=("vizwiz_vqa",)),
    TaskScorer("okvqa", evalai_people, "accuracy", (), _IMAGE, PROTOCOLS, "ten answers",
        data="okvqa.allenai.org, images of COCO", paper="1906.00067", aliases=("ok_vqa",)),
    TaskScorer("gqa", gqa, "accuracy", (), ("imageId", "types", "cluster"), PROTOCOLS, "the right answer",
        data="cs.stanford.edu/people/dorarad/gqa", licence="CC-BY-4.0", paper="1902.09506",
        aliases=("gqa_testdev_balanced",)),
    TaskScorer("docvqa", anls, "anls", (), (*_IMAGE, "docId", "answer_type"), (*PROTOCOLS, "paper"), "a list of answers",
        data="rrc.cvc.uab.es, challenge 17, after registration", paper="2007.00398", aliases=("docvqa_val",)),
    TaskScorer("infovqa", anls, "anls", (), (*_IMAGE, "answer_type"), (*PROTOCOLS, "paper"), "a list of answers",
        data="rrc.cvc.uab.es, challenge 17, after registration", paper="2104.12756", aliases=("infographicvqa",)),
    TaskScorer("stvqa", anls, "anls", (), _IMAGE, (*PROTOCOLS, "paper"), "a list of answers",
        data="rrc.cvc.uab.es, challenge 11, after registration", paper="1905.13648", aliases=("st_vqa",)),
    TaskScorer("chartqa", chartqa, "relaxed_accuracy", (), ("split", *_IMAGE), PROTOCOLS, "the right answer",
        data="github.com/vis-nlp/ChartQA", licence="GPL-3.0", paper="2203.10244", aliases=("chartqa_test",)),
)  # fmt: skip

#: All tasks by name.
SCORERS: dict[str, TaskScorer] = {entry.name: entry for entry in (*_ENTRIES, *_SHORT_ANSWERS)}
_ALIASES = {alias: entry.name for entry in SCORERS.values() for alias in entry.aliases}


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
