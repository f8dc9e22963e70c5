"""Benchmarks that another model judges: LLaVA-Bench and MM-Vet, by requests that are exported and answers imported.

No judge is called here. `requests` gives what to ask, one prompt for each row, with a digest; answers come back with
the digest, so that a judgement of another answer is not taken for one of this. A number stands under the benchmark's
own name only if the judge is the one that the benchmark used; with any other the metric carries the judge's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.scorers.records import (
    Counts,
    Metric,
    Result,
    Row,
    Sample,
    clusters,
    identity,
    mean,
    optional,
    required,
    text,
    unparsed,
)

Resources = Mapping[str, str]
#: From a row and the benchmark's files to the prompt for the judge; None if the row needs no judgement.
Prompt = Callable[[Row, Resources], str | None]

_FIELD = re.compile(r"\{(\w+)\}")
#: The judges that the benchmarks themselves used.
LLAVA_BENCH_JUDGES = ("gpt-4-0314",)
MM_VET_JUDGES = ("gpt-4-0613",)


def requests(rows: Sequence[Row], prompt: Prompt, resources: Resources) -> list[dict[str, str]]:
    """What to ask a judge: `id`, `prompt` and the `sha256` of what is judged, for each row that needs it."""
    asked = [(row, prompt(row, resources)) for row in rows]
    return [{"id": identity(row), "prompt": words, "sha256": digest(row)} for row, words in asked if words is not None]


def with_judgements(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]], field: str) -> list[dict[str, Any]]:
    """The rows with what the judge said; rows without an answer stay as they are.

    Args:
        rows: that were asked about.
        answers: `id`, `judge` (the judge's name), `judgement` and, better, the `sha256` of the request.
        field: of the row into which the judgement goes.

    Raises:
        DataError: an answer without its fields or to no row, two to one row, or one with the digest of something else.
    """
    digests = {identity(row): digest(row) for row in rows}
    said: dict[str, Mapping[str, Any]] = {}
    for answer in answers:
        own = identity(answer)
        if own in said or own not in digests:
            raise DataError(f"judgement {own}: {'a second one' if own in said else 'there is no such row'}")
        if answer.get("sha256") not in (None, digests[own]):
            raise DataError(
                f"judgement {own}: made for something else (the prediction, target or question has changed)"
            )
        text(answer, "judge")
        text(answer, "judgement")
        said[own] = answer
    return [
        {**row, field: said[identity(row)]["judgement"], "judge": said[identity(row)]["judge"]}
        if identity(row) in said
        else dict(row)
        for row in rows
    ]


def judge_suffix(rows: Sequence[Row], accepted: Sequence[str], protocol: str, task: str) -> str:
    """What a metric's name gets: nothing under `official`, which wants the benchmark's judge, else the judge's name.

    Raises:
        ConfigError: another judge, or several, under `official`.
    """
    judges = sorted({text(row, "judge") for row in rows})
    if protocol != "official":
        return f" (judge {', '.join(judges)}; not comparable)"
    if len(judges) != 1 or judges[0] not in accepted:
        raise ConfigError(
            f"task {task} is judged by {' or '.join(accepted)}, but here by {', '.join(judges)}: "
            "use the protocol substitute, which puts the judge's name into that of the metric"
        )
    return ""


def digest(row: Row) -> str:
    """The SHA-256 of what is judged of a row: id, prediction, target and question."""
    judged = [row.get(key) for key in ("id", "prediction", "target", "question")]
    return hashlib.sha256(json.dumps(judged, sort_keys=True).encode()).hexdigest()


def template_prompt(row: Row, resources: Resources) -> str:
    """The resource `prompt` with `{name}` replaced by the row's field of that name."""
    return _FIELD.sub(lambda name: text(row, name[1]), resources["prompt"])


def llava_bench(rows: Sequence[Row], protocol: str) -> Result:
    """LLaVA-Bench (in the Wild): 100 × the mean score of the answers over that of the reference answers.

    `judgement` begins with a line of two scores, that of the reference (`target`) first. A line that does not gives -1
    to both, which the official script averages in; `unparsed_rate` says how often.
    """
    name = "relative_score" + judge_suffix(rows, LLAVA_BENCH_JUDGES, protocol, "llava_bench")
    samples, scores = [], []
    for row in rows:
        pair = llava_scores(text(row, "judgement"))
        scores.append(pair or (-1.0, -1.0))
        parsed = None if pair is None else f"{pair[0]:g} {pair[1]:g}"
        rule = "first line" if pair else "none"
        samples.append(Sample(identity(row), None, parsed, rule, clusters(row, "image"), optional(row, "category")))
    held = np.array(scores, dtype=np.float64)
    metrics = {name: Metric(held, _relative)}
    for category in dict.fromkeys(sample.category for sample in samples if sample.category):
        inside = np.array([[sample.category == category] for sample in samples])
        metrics[f"{name}/{category}"] = Metric(held * inside, _relative)
    metrics["unparsed_rate"] = unparsed(samples)
    return Result(tuple(samples), metrics)


def _relative(sums: Counts) -> Counts:
    first = sums[..., 0]
    return np.divide(100 * sums[..., 1], first, out=np.full_like(first, np.nan), where=first != 0)


def llava_scores(judgement: str) -> tuple[float, float] | None:
    """The two scores of the first line, between which a comma or a single space stands."""
    parts = judgement.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return None
    return (first, second) if np.isfinite([first, second]).all() else None


def llava_prompt(row: Row, resources: Resources) -> str:
    """LLaVA-Bench's request: the image's captions, the question, both answers, and the rule of the category."""
    try:
        rules = json.loads(resources["rule"])
        rule = rules[f"llava_bench_{text(row, 'category')}"]
        role, words = rule["role"], rule["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"row {identity(row)}: the resource 'rule' has no rule for its category: {error!r}") from error
    caption = required(row, "caption")
    context = "\n".join(map(str, caption)) if isinstance(caption, list) else str(caption)
    answers = "".join(
        f"[{role} {number}]\n{answer}\n\n[End of {role} {number}]\n\n"
        for number, answer in ((1, text(row, "target")), (2, text(row)))
    )
    return f"[Context]\n{context}\n\n[Question]\n{text(row, 'question')}\n\n{answers}[System]\n{words}\n\n"


def mm_vet(rows: Sequence[Row], protocol: str) -> Result:
    """MM-Vet: the mean score of the judge, 0..1, over all questions and over those that need each capability.

    `judgement` begins with the score. One that cannot be read counts 0, as it does after the official script has asked
    five times. `capability` lists what a question needs.
    """
    name = "score" + judge_suffix(rows, MM_VET_JUDGES, protocol, "mm_vet")
    samples = []
    for row in rows:
        score = vet_score(text(row, "judgement"))
        parsed = None if score is None else f"{score:g}"
        samples.append(Sample(identity(row), score or 0.0, parsed, "number", clusters(row, "image")))
    metrics = {name: mean(sample.score for sample in samples)}
    needs = [row.get("capability") or [] for row in rows]
    for capability in dict.fromkeys(str(one) for own in needs for one in own):
        pairs = zip(samples, needs, strict=True)
        metrics[f"{name}/{capability}"] = mean(sample.score if capability in own else None for sample, own in pairs)
    metrics["unparsed_rate"] = unparsed(samples)
    return Result(tuple(samples), metrics)


def vet_score(judgement: str) -> float | None:
    """The number in front, if it lies in 0..1."""
    try:
        score = float(judgement.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def mm_vet_prompt(row: Row, resources: Resources) -> str:
    """MM-Vet's request: the few-shot prompt of its script, and a line of its table with the score left open."""
    target = text(row, "target").replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    line = " | ".join((text(row, "question"), target, text(row), ""))
    return f"{resources['prompt']}\n{line}"
