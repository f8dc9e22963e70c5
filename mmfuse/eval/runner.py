"""Lets a model answer a task: in planned batches, stored batch by batch, with every failure counted and named."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mmfuse.errors import ConfigError, DataError, RunError
from mmfuse.eval.batching import Backoff, Batch, plan_batches
from mmfuse.eval.engine import Answer, Engine, Likelihoods
from mmfuse.eval.ranks import Ranks
from mmfuse.eval.store import PredictionStore
from mmfuse.eval.tasks.items import Item, Request, Task, digest_of

OnError = Literal["wrong", "skip", "abort"]
Record = dict[str, Any]

#: What the model itself may say about media that it cannot take.
_UNUSABLE = (DataError, ValueError, TypeError)


@dataclass(frozen=True)
class RunSettings:
    """How a task is run.

    Attributes:
        batch_tokens: tokens of a batch, padding and room for the answer included.
        batch_size: items of a batch at most; None leaves that to the tokens.
        on_error: what a sample whose media cannot be used is: `wrong`, left out (`skip`), or the end (`abort`).
        fresh: forget answers that are already in the output folder.
    """

    batch_tokens: int = 16384
    batch_size: int | None = None
    on_error: OnError = "wrong"
    fresh: bool = False


class Watcher(Protocol):
    """Is told how far a task is."""

    def begin(self, task: Task, total: int, done: Sequence[Record]) -> None:
        """A task begins; `done` are the answers that an earlier run has left."""
        ...

    def answered(self, records: Sequence[Record]) -> None:
        """These have come."""
        ...


@dataclass(frozen=True)
class TaskRun:
    """A task with all its answers.

    Attributes:
        task: what was asked.
        records: the answers in the task's order.
        asked: how many of them this process obtained from the model; the others were stored.
        halved: batches that did not fit into memory and were halved.
    """

    task: Task
    records: tuple[Record, ...]
    asked: int
    halved: int

    @property
    def errors(self) -> tuple[Record, ...]:
        """The answers that could not be asked for."""
        return tuple(record for record in self.records if "error" in record)


def run_task(
    engine: Engine,
    task: Task,
    out: Path,
    settings: RunSettings | None = None,
    *,
    ranks: Ranks | None = None,
    watcher: Watcher | None = None,
) -> TaskRun:
    """Let a model answer a task; go on where an earlier run was cut off.

    Args:
        engine: the model.
        task: what is asked.
        out: the folder of the evaluation, see `PredictionStore`.
        settings: how; the defaults if None.
        ranks: this process among others; alone if None.
        watcher: told how far it is.

    Raises:
        ConfigError: the folder holds answers that were made otherwise.
        DataError: a sample that cannot be used, under `on_error="abort"`.
        RunError: another rank has failed.
    """
    settings, ranks = settings or RunSettings(), ranks or Ranks()
    identity = engine.identity() | task_identity(task)
    if settings.fresh and ranks.first:
        PredictionStore.remove(out, task.name)
    ranks.gather(None)
    store = PredictionStore(out, task.name, identity, ranks.rank)
    shared = digest_of(identity)
    asker = _Asker(engine, task, shared, settings.on_error)
    asker.check_stored(store.done)
    ranks.gather(None)  # nobody writes before all have read
    if ranks.first:
        store.claim()
    batches = _planned(engine, task, settings)
    mine = [batch for number, batch in enumerate(batches) if number % ranks.world == ranks.rank]
    waiting = [batch for batch in mine if any(task.items[i].id not in store.done for i in batch.items)]
    if watcher is not None:
        total = sum(len(batch.items) for batch in mine)
        own = [store.done[task.items[i].id] for batch in mine if batch not in waiting for i in batch.items]
        watcher.begin(task, total, own)
    failure, asked = None, 0
    try:
        for batch in waiting:
            # Whole batches, also where a kill has left a part of one: other batches would give other last bits.
            records = asker.answer(batch.items)
            store.append([record for record in records if record["id"] not in store.done])
            asked += len(records)
            if watcher is not None:
                watcher.answered(records)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        ranks.check(failure)
    return _finished(task, store, ranks, asked, asker.backoff.halved)


def _finished(task: Task, store: PredictionStore, ranks: Ranks, asked: int, halved: int) -> TaskRun:
    ids = [item.id for item in task.items]
    records = store.finish(ids) if ranks.first else None
    shared = ranks.gather(records)[0]
    return TaskRun(task, tuple(shared), asked, halved)


def task_identity(task: Task) -> dict[str, str]:
    """What of a task the answers depend on, by name."""
    return {
        "task": task.name,
        "task version": task.version,
        "protocol": task.protocol,
        "questions": task.digest,
        "request": f"{task.request}, {task.max_new_tokens} tokens"
        if task.request is Request.GENERATE
        else f"{task.request}, {'mean over tokens' if task.per_token else 'sum over tokens'}",
    }


def _planned(engine: Engine, task: Task, settings: RunSettings) -> list[Batch]:
    lengths = [engine.lengths(item, task.request) for item in task.items]
    extra = task.max_new_tokens if task.request is Request.GENERATE else 0
    return plan_batches(lengths, settings.batch_tokens, extra=extra, most=settings.batch_size)


class _Asker:
    """Asks items and makes records of the answers."""

    def __init__(self, engine: Engine, task: Task, shared: str, on_error: OnError) -> None:
        self._engine, self._task, self._shared, self._on_error = engine, task, shared, on_error
        self.backoff = Backoff()

    def check_stored(self, done: Mapping[str, Record]) -> None:
        """Raise ConfigError where a stored answer belongs to other media than those that are there now."""
        for item in self._task.items:
            if item.id in done and done[item.id]["key"] != self._record(item, *self._read(item))["key"]:
                raise ConfigError(
                    f"task {self._task.name}: the media of {item.id} have changed since it was answered "
                    f"({', '.join(file.name for file in item.media)}); use another --out, or --fresh"
                )

    def answer(self, places: Sequence[int]) -> list[Record]:
        """The records of the items at these places."""
        records: dict[int, Record] = {}
        media: dict[int, list[Any]] = {}
        for place in places:
            item = self._task.items[place]
            data, problem = self._read(item)
            records[place] = self._record(item, data, problem)
            if problem is None:
                try:
                    media[place] = [file.decode(own) for file, own in zip(item.media, data, strict=True)]
                except DataError as error:
                    self._fail(records[place], item, f"decode: {error}")
            else:
                self._fail(records[place], item, problem)
        if media:
            for place, answer in zip(media, self._asked(list(media), media, records), strict=True):
                if answer is not None:
                    records[place] |= self._answered(self._task.items[place], answer)
        return [records[place] for place in places]

    def _asked(
        self, places: Sequence[int], media: Mapping[int, list[Any]], records: Mapping[int, Record]
    ) -> list[Answer | Likelihoods | None]:
        """Answers in order; None where the model cannot take the media, which the record then says."""
        found: list[Any] = []
        try:
            return self.backoff.run(places, lambda some: self._call(some, media))
        except _UNUSABLE as error:
            if len(places) == 1:
                self._fail(records[places[0]], self._task.items[places[0]], f"input: {error}")
                return [None]
        # Something in the batch cannot be used. Asked one by one, the others do not go under with it.
        for place in places:
            found += self._asked([place], media, records)
        return found

    def _call(self, places: Sequence[int], media: Mapping[int, list[Any]]) -> list[Any]:
        items = [self._task.items[place] for place in places]
        own = [media[place] for place in places]
        if self._task.request is Request.GENERATE:
            return self._engine.generate(items, own, self._task.max_new_tokens)
        return self._engine.likelihoods(items, own)

    def _read(self, item: Item) -> tuple[list[bytes], str | None]:
        """The bytes of an item's media, and why they could not be read."""
        try:
            return [file.read() for file in item.media], None
        except (OSError, DataError) as error:
            return [], f"read: {error}"

    def _record(self, item: Item, data: Sequence[bytes], problem: str | None) -> Record:
        prompt = self._engine.prompt(item)
        digests = [hashlib.sha256(own).hexdigest() for own in data]
        files = [
            {"modality": file.modality, "name": file.name, **({"sha256": digests[i]} if digests else {})}
            for i, file in enumerate(item.media)
        ]
        return {
            "id": item.id,
            "prediction": "",
            "target": item.target,
            **item.fields,
            "category": item.category,
            "cluster": item.cluster or item.id,
            "prompt": prompt,
            "media": files,
            "key": digest_of([self._shared, item.id, prompt, item.options, digests, problem is not None]),
        }

    def _fail(self, record: Record, item: Item, problem: str) -> None:
        if self._on_error == "abort":
            raise DataError(f"task {self._task.name}, {item.id}: {problem}")
        record["error"] = problem

    def _answered(self, item: Item, answer: Answer | Likelihoods) -> Record:
        if isinstance(answer, Answer):
            if not math.isfinite(answer.logprob):
                raise RunError(f"task {self._task.name}, {item.id}: the model gives log-probabilities that are NaN")
            return {
                "prediction": answer.text,
                "finished": answer.finished,
                "tokens": answer.tokens,
                "logprob": answer.logprob,
                "margin": answer.margin,
            }
        return ranked(item, answer, per_token=self._task.per_token)


def ranked(item: Item, found: Likelihoods, *, per_token: bool) -> Record:
    """The most likely option as the prediction; among equals the first."""
    scores = list(found.logprobs)
    if per_token:
        scores = [score / count for score, count in zip(scores, found.tokens, strict=True)]
    if not all(map(math.isfinite, scores)):
        raise RunError(f"{item.id}: the model gives log-likelihoods that are NaN or infinite")
    best = max(range(len(scores)), key=lambda option: (scores[option], -option))
    order = sorted(scores, reverse=True)
    return {
        "prediction": (item.labels or item.options)[best],
        "logprobs": list(found.logprobs),
        "options": list(item.options),
        "tokens": sum(found.tokens),
        "margin": order[0] - order[1],
    }
