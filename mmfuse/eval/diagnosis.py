"""Does a model use its media, and where? Diagnostics of fusion on some items of a task, as one JSON value.

What is taken away counts more than where attention goes: `ablation` is the first to read. Δ log p is the log-likelihood
of the right answer with the medium less that without its structure (blank), or with the medium of another item
(shuffled). A model that does not look has 0 in both.

Shapes: `L` layers, `H` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mmfuse.analysis.dominance import Dominance, dominance_index, modality_dominance
from mmfuse.analysis.exits import media_until
from mmfuse.analysis.heads import head_divergence, head_outputs
from mmfuse.analysis.mode import evaluation_mode
from mmfuse.analysis.sinks import visual_sinks
from mmfuse.errors import DataError
from mmfuse.eval.engine import NetworkEngine, answer_logprobs
from mmfuse.eval.questions import plain_image
from mmfuse.eval.statistics import mean_interval
from mmfuse.eval.tasks.items import Item, Task
from mmfuse.models.media import Features


@dataclass(frozen=True)
class Probe:
    """An item that the model is looked at with.

    Attributes:
        item: what is asked.
        answer: the right answer in words.
        media: decoded.
    """

    item: Item
    answer: str
    media: tuple[Any, ...]

    def with_media(self, media: Sequence[Any]) -> Probe:
        """The same question about other media."""
        return replace(self, media=tuple(media))


def probes(task: Task, count: int) -> tuple[list[Probe], list[str]]:
    """Up to `count` items with media, spread over the task, and the ids of those whose media cannot be read.

    Raises:
        DataError: no item has media that can be read.
    """
    held = [item for item in task.items if item.media]
    chosen = [held[i] for i in sorted({round(i) for i in np.linspace(0, len(held) - 1, min(count, len(held)))})]
    found, lost = [], []
    for item in chosen:
        try:
            media = tuple(file.decode(file.read()) for file in item.media)
        except (OSError, DataError):
            lost.append(item.id)
            continue
        found.append(Probe(item, right_answer(item), media))
    if not found:
        raise DataError(f"task {task.name}: no item has media that can be read; fusion cannot be diagnosed")
    return found, lost


def right_answer(item: Item) -> str:
    """The right answer in the words that the model would say."""
    target = item.target[0] if isinstance(item.target, list | tuple) else item.target
    if item.labels:
        return item.options[item.labels.index(str(target))]
    return str(target)


def blank(media: Sequence[Any]) -> list[Any]:
    """The same media without structure."""
    return [medium.plain() if isinstance(medium, Features) else plain_image(medium) for medium in media]


def diagnose(
    engine: NetworkEngine, task: Task, count: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """All diagnostics that look into the model, on up to `count` items of a task.

    Raises:
        DataError: no item has media that can be read.
    """
    found, lost = probes(task, count)
    result: dict[str, Any] = {"samples": len(found), "unreadable": lost}
    for name, look in (("ablation", ablation), ("dominance", dominance), ("sinks", sinks), ("heads", heads),
                       ("exits", exits)):  # fmt: skip
        progress(f"{task.name}: {name}")
        result[name] = look(engine, found)
    return result


def ablation(engine: NetworkEngine, found: Sequence[Probe]) -> dict[str, Any]:
    """Δ log p of the right answer, in nats: its mean with a 95 % interval over clusters, and for each sample."""
    whole = _logprobs(engine, found)
    others: dict[str, Sequence[Probe | None]] = {
        "blank": [probe.with_media(blank(probe.media)) for probe in found],
        "shuffle": shuffled(found),
    }
    result = {}
    clusters = [probe.item.cluster or probe.item.id for probe in found]
    for name, probes_without in others.items():
        kept = [i for i, probe in enumerate(probes_without) if probe is not None]
        if not kept:
            continue
        apart = whole[kept] - _logprobs(engine, [p for p in probes_without if p is not None])
        interval = mean_interval(apart, [clusters[i] for i in kept])
        samples = {found[i].item.id: float(own) for i, own in zip(kept, apart, strict=True)}
        result[name] = {"mean": float(apart.mean()), "low": interval.low, "high": interval.high, "samples": samples}
    return result


def shuffled(found: Sequence[Probe]) -> list[Probe | None]:
    """Each question with the media of the next item that has others of the same kind; None where there is none."""
    made: list[Probe | None] = []
    for place, probe in enumerate(found):
        others = [*found[place + 1 :], *found[:place]]
        names = [file.name for file in probe.item.media]
        kinds = [file.modality for file in probe.item.media]
        other = next((o for o in others if [f.modality for f in o.item.media] == kinds
                      and [f.name for f in o.item.media] != names), None)  # fmt: skip
        made.append(None if other is None else probe.with_media(other.media))
    return made


def dominance(engine: NetworkEngine, found: Sequence[Probe]) -> dict[str, Any]:
    """MDI and AEI, with and without the first token, for all samples and in strata of equally many media tokens."""
    result: dict[str, Any] = {}
    batches = [engine.inputs(probe.item, probe.media, probe.answer) for probe in found]
    counts = [int(batch["tokens"].is_media.sum()) for batch in batches]
    for name, skip in (("with_first_token", False), ("without_first_token", True)):
        looked = [modality_dominance(engine.model, batch, skip_first=skip) for batch in batches]
        result[name] = _dominance(looked) | {
            "strata": {
                str(number): _dominance([own for own, count in zip(looked, counts, strict=True) if count == number])
                for number in sorted(set(counts))
            }
        }
    return result


def _dominance(looked: Sequence[Dominance]) -> dict[str, Any]:
    share = torch.stack([own.text_share for own in looked]).mean(0)
    tokens = torch.stack([own.token_share for own in looked]).mean()
    mdi = dominance_index(share, tokens)
    names = list(dict.fromkeys(name for own in looked for name in own.aei))
    aei = {name: torch.stack([own.aei[name] for own in looked if name in own.aei]).mean(0).tolist() for name in names}
    whole = replace(looked[0], text_share=share, token_share=tokens, mdi=mdi)
    return {"samples": len(looked), "text_share": share.tolist(), "token_share": float(tokens),
            "mdi": mdi.tolist(), "aei": aei, "mdi_by_depth": whole.groups()}  # fmt: skip


def sinks(engine: NetworkEngine, found: Sequence[Probe]) -> dict[str, Any]:
    """The share of visual attention that falls on sinks, by layer: mean, least and most over samples."""
    shares = torch.cat([visual_sinks(engine.model, engine.inputs(p.item, p.media, p.answer)) for p in found])
    return {"mean": shares.mean(0).tolist(), "least": shares.amin(0).tolist(), "most": shares.amax(0).tolist()}


def heads(engine: NetworkEngine, found: Sequence[Probe]) -> dict[str, Any]:
    """The vision-aware divergence of each head `[L, H]`, mean over samples."""
    apart, relative = [], []
    for probe in found:
        seen, without = (head_outputs(engine.model, engine.inputs(probe.item, media))
                         for media in (probe.media, blank(probe.media)))  # fmt: skip
        one, other = head_divergence(seen, without)
        apart.append(one)
        relative.append(other)
    return {"vhd": torch.stack(apart).mean(0).tolist(), "relative": torch.stack(relative).mean(0).tolist()}


def exits(engine: NetworkEngine, found: Sequence[Probe]) -> dict[str, Any]:
    """Log p of the right answer where media are hidden from layer 0, 1, … on: means with 95 % intervals.

    Each value is the difference from the whole model, so the last is 0.
    """
    depth = engine.model.config.text_config.num_hidden_layers
    table = np.array([[_exit_logprob(engine, probe, layer) for layer in range(depth + 1)] for probe in found])
    lost = table - table[:, -1:]
    clusters = [probe.item.cluster or probe.item.id for probe in found]
    intervals = [mean_interval(column, clusters) for column in lost.T]
    return {"layers": list(range(depth + 1)), "mean": lost.mean(0).tolist(),
            "low": [own.low for own in intervals], "high": [own.high for own in intervals]}  # fmt: skip


def _exit_logprob(engine: NetworkEngine, probe: Probe, layer: int) -> float:
    batch = engine.inputs(probe.item, probe.media, probe.answer)
    tokens = batch["tokens"]
    last = tokens.is_answer & (tokens.turn == tokens.turn.amax(1, keepdim=True))
    model = engine.model
    with evaluation_mode(model), torch.inference_mode(), media_until(model, layer, tokens) as fusion:
        logits = model(**batch, fusion=fusion, logits_to_keep=int(last.sum()) + 1).logits
    return float(answer_logprobs(logits, batch["input_ids"], last).sum())


def _logprobs(engine: NetworkEngine, found: Sequence[Probe]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of the right answers, one by one, so that the shapes of matrices cannot differ between what is compared."""
    made = []
    for probe in found:
        item = replace(probe.item, options=(probe.answer,), labels=())
        (own,) = engine.likelihoods([item], [probe.media])
        made.append(own.logprobs[0])
    return np.array(made)
