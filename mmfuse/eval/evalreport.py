"""What an evaluation leaves behind: `results.json`, scored samples, `report.md` and `report.html`."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmfuse.errors import DataError
from mmfuse.eval.report import percent, percent_range
from mmfuse.eval.results import provenance, write_text_atomically
from mmfuse.eval.runner import Record
from mmfuse.eval.scorers import Sample
from mmfuse.eval.scoring import Estimated, TaskScore, plain

#: Wrong answers that the report shows for each task, the most confident first.
WORST = 8
THUMBNAIL = 96
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#1d1f24;max-width:64rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}th,td{padding:.25rem .8rem;text-align:left;"
    "border-bottom:1px solid #d9dce1;vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}"
    "img{width:96px;image-rendering:pixelated}.note{color:#5b616e}"
)


def write_evaluation(out: Path, scores: Sequence[TaskScore], identity: dict[str, str]) -> None:
    """Write all files. Only `report.*` and the origin in `results.json` depend on the machine.

    Args:
        out: the folder of the evaluation.
        scores: of all tasks.
        identity: of the model.
    """
    for score in scores:
        lines = [json.dumps(row, ensure_ascii=False) for row in sample_rows(score)]
        write_text_atomically(out / "samples" / f"{score.run.task.name}.jsonl", "\n".join(lines) + "\n")
    document = {
        "schema": 1,
        "model": identity,
        "tasks": {score.run.task.name: plain(score) for score in scores},
        "origin": provenance(),
    }
    write_text_atomically(out / "results.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    write_text_atomically(out / "report.md", markdown(scores, identity))
    write_text_atomically(out / "report.html", page(scores, identity))


def sample_rows(score: TaskScore) -> list[dict[str, Any]]:
    """For each sample what was asked and answered, what was read from the answer and by which rule, and its score."""
    by_id = {sample.id: sample for sample in score.result.samples}
    rows = []
    for record in score.run.records:
        sample = by_id.get(str(record["id"])) or Sample(str(record["id"]), 0.0, None, "error")
        kept = {name: value for name, value in record.items() if name not in ("prompt", "key")}
        rows.append({**kept, "parsed": sample.parsed, "rule": sample.rule, "score": sample.score})
    return rows


def how_computed(score: TaskScore) -> str:
    """One line that says how the primary number of a task came about."""
    task, (name, own) = score.run.task, score.primary
    asked = f"greedy, at most {task.max_new_tokens} tokens"
    if task.request == "rank":
        asked = f"log-likelihood, {'mean' if task.per_token else 'sum'} over an option's tokens and its end"
    return (
        f"{name} by the scorer {task.scorer}, protocol {task.protocol}; {asked}; {len(score.run.records)} samples in "
        f"{own.clusters} clusters, interval: {own.method}; {len(score.run.errors)} errors, "
        f"{percent(score.unparsed_rate)} unparsed; questions {task.digest[:12]}"
    )


def calibration(score: TaskScore, bins: int = 5) -> tuple[float, list[tuple[float, float, int]]]:
    """The expected calibration error, and for each bin the mean confidence, the share that is right and its size.

    Confidence is the probability of the whole answer under greedy decoding, or of the winning option among all.
    """
    held = [(confidence(r), s.score) for r, s in zip(score.scored, score.result.samples, strict=True)]
    pairs = [(c, float(right)) for c, right in held if right is not None]
    table, total = [], 0.0
    for number in range(bins):
        own = [pair for pair in pairs if min(int(pair[0] * bins), bins - 1) == number]
        if own:
            sure, right = (sum(pair[i] for pair in own) / len(own) for i in (0, 1))
            table.append((sure, right, len(own)))
            total += abs(sure - right) * len(own) / len(pairs)
    return total, table


def confidence(record: Record) -> float:
    """See `calibration`; 0..1."""
    if "logprobs" in record:
        best = max(record["logprobs"])
        return 1 / sum(math.exp(own - best) for own in record["logprobs"])
    return math.exp(min(0.0, record["logprob"]))


def worst(score: TaskScore) -> list[tuple[Record, Sample]]:
    """The wrong answers of which the model was most sure."""
    pairs = zip(score.scored, score.result.samples, strict=True)
    wrong = [(record, sample) for record, sample in pairs if sample.score is not None and sample.score < 0.5]
    return sorted(wrong, key=lambda pair: -confidence(pair[0]))[:WORST]


def markdown(scores: Sequence[TaskScore], identity: dict[str, str]) -> str:
    """The report as Markdown."""
    model = f"fusion {identity['fusion']}, weights {identity['weights'][:12]}"
    lines = ["# Evaluation", "", model, "", "| task | metric | value | 95 % interval | n |", "|---|---|---:|---:|---:|"]
    for score in scores:
        name, own = score.primary
        cells = (score.run.task.name, name, percent(own.value), _range(own), str(len(score.run.records)))
        lines.append(f"| {' | '.join(cells)} |")
    for score in scores:
        lines += ["", f"## {score.run.task.name}", "", how_computed(score), ""]
        rest = list(score.metrics.items())[1:]
        lines += [f"- {name}: {percent(own.value)} ({_range(own)})" for name, own in rest]
        error, _ = calibration(score)
        lines += [f"- expected calibration error: {error:.3f}", f"- answers: {_lengths(score)}"]
        lines += [f"- warning: {warning}" for warning in score.warnings]
        lines += [f"- error: {record['id']}: {record['error']}" for record in score.run.errors]
    return "\n".join(lines) + "\n"


def page(scores: Sequence[TaskScore], identity: dict[str, str]) -> str:
    """The report as one HTML page that needs no other file."""
    model = html.escape(f"fusion {identity['fusion']}, weights {identity['weights'][:12]}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{STYLE}</style>",
        f"<h1>Evaluation</h1><p class=note>{model}",
        "<table><tr><th>task<th>metric<th class=n>value<th class=n>95 % interval<th class=n>n",
    ]
    for score in scores:
        name, own = score.primary
        task = html.escape(score.run.task.name)
        parts.append(
            f"<tr><td><a href='#{task}'>{task}</a><td>{html.escape(name)}<td class=n>{percent(own.value)}"
            f"<td class=n>{_range(own)}<td class=n>{len(score.run.records)}"
        )
    parts.append("</table>")
    for score in scores:
        parts += _section(score)
    return "\n".join(parts) + "\n"


def _section(score: TaskScore) -> list[str]:
    task = html.escape(score.run.task.name)
    parts = [f"<h2 id='{task}'>{task}</h2><p class=note>{html.escape(how_computed(score))}"]
    parts += [f"<p><b>Warning:</b> {html.escape(warning)}" for warning in score.warnings]
    rest = list(score.metrics.items())[1:]
    if rest:
        rows = "".join(
            f"<tr><td>{html.escape(name)}<td class=n>{percent(own.value)}<td class=n>{_range(own)}"
            for name, own in rest
        )
        parts.append(f"<table><tr><th>metric<th class=n>value<th class=n>95 % interval{rows}</table>")
    error, table = calibration(score)
    rows = "".join(f"<tr><td class=n>{sure:.2f}<td class=n>{right:.2f}<td class=n>{n}" for sure, right, n in table)
    parts.append(
        f"<p>Answers: {_lengths(score)}. Expected calibration error: {error:.3f}"
        f"<table><tr><th class=n>confidence<th class=n>right<th class=n>samples{rows}</table>"
    )
    shown = worst(score)
    if shown:
        rows = "".join(_worst_row(score, record, sample) for record, sample in shown)
        parts.append(f"<table><tr><th><th>prompt<th>expected<th>answer<th class=n>confidence{rows}</table>")
    if score.run.errors:
        rows = "".join(f"<li>{html.escape(str(r['id']))}: {html.escape(r['error'])}" for r in score.run.errors)
        parts.append(f"<p>Samples that could not be asked:<ul>{rows}</ul>")
    return parts


def _worst_row(score: TaskScore, record: Record, sample: Sample) -> str:
    return (
        f"<tr><td>{_thumbnail(score, str(record['id']))}<td>{html.escape(record['prompt'])}"
        f"<td>{html.escape(str(record['target']))}<td>{html.escape(record['prediction'])}"
        f"<td class=n>{confidence(record):.2f}"
    )


def _thumbnail(score: TaskScore, name: str) -> str:
    """The first picture of a sample, small; nothing where there is none that can be shown."""
    item = next(item for item in score.run.task.items if item.id == name)
    try:
        media = [file.decode(file.read()) for file in item.media[:1]]
    except (OSError, DataError):
        return ""
    if not media or not isinstance(media[0], Image.Image):
        return ""
    small, out = media[0].copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(out, format="PNG")
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}'>"


def _lengths(score: TaskScore) -> str:
    if score.run.task.request == "rank":
        return "options ranked"
    counts = sorted(record["tokens"] for record in score.scored)
    cut = sum(not record["finished"] for record in score.scored)
    return f"{counts[0]}–{counts[-1]} tokens, median {counts[len(counts) // 2]}, {cut} cut"


def _range(own: Estimated) -> str:
    return "–" if math.isnan(own.low) else percent_range((own.low, own.high))
