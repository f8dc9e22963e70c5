"""The training loader: sized, started when it is first asked, and with a state that follows what was trained on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch.utils.data import DataLoader

from mmfuse.data.stream import ORIGIN, BatchStream, Failure, Place, first_places
from mmfuse.data.workers import shield_worker
from mmfuse.errors import ConfigError, RunError

VERSION: Final = 1
#: Seconds between looks whether the workers live.
_LOOK: Final = 5.0
#: What torch says when that time is over and all of them do.
_PATIENCE: Final = "DataLoader timed out"
_DEATH: Final = re.compile(r"DataLoader worker \(pid(\(s\))? .*\) (is killed by signal|exited unexpectedly)")


class StreamLoader:
    """The batches of a `BatchStream`, through worker processes.

    Args:
        stream: of this rank.
        workers: processes that read and encode; 0 does it in this one.
        pin_memory: copy batches into memory that a GPU reads from directly.
        timeout: seconds after which a batch that does not come ends the run; 0 waits for ever.
    """

    def __init__(self, stream: BatchStream, *, workers: int = 0, pin_memory: bool = False, timeout: float = 0) -> None:
        self.stream = stream
        self._options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        self.timeout = timeout
        if workers:
            # torch looks whether its workers live when this is over. The signal of their death alone can be lost: it
            # becomes an exception wherever the process is at that moment, and some places swallow exceptions.
            self._options["timeout"] = min(_LOOK, timeout) if timeout else _LOOK

    def __len__(self) -> int:
        """Return the number of batches of the whole run on this rank, wherever the stream starts."""
        return len(self.stream.plan) // self.stream.world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream = self.stream
        # A generator of its own: starting an iterator must not draw from the one that dropout uses.
        generator = torch.Generator().manual_seed(stream.encoding.seed)
        loader = DataLoader(
            stream,
            batch_size=None,
            collate_fn=_as_it_is,
            generator=generator,
            worker_init_fn=shield_worker,
            **self._options,
        )
        for number, batch in enumerate(self._watched(loader), start=stream.start):
            if isinstance(batch, Failure):
                raise batch.error
            expected = number * stream.world + stream.rank
            if batch[ORIGIN]["batch"] != expected:
                raise RunError(f"batch {batch[ORIGIN]['batch']} came where batch {expected} was due")
            yield batch

    def _watched(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """The same batches; workers that die or hang end the run with what they were reading.

        Errors of the data come as a `Failure`, so that what is raised here is about the workers themselves.
        """
        batches, waited = iter(loader), 0.0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not loader.num_workers:
                    raise
                reason = str(error)
                if _PATIENCE in reason:
                    waited += loader.timeout
                    if not self.timeout or waited < self.timeout:
                        continue
                    reason = f"no batch came in {self.timeout:g} seconds"
                raise self._failed(reason) from error
            waited = 0.0
            yield batch

    def _failed(self, reason: str) -> RunError:
        places = [place for place in self.stream.reading() if place]
        return RunError(
            f"the data workers failed: {reason}. The last samples that they read: {', '.join(places) or 'none'}. "
            "Continue with --ckpt_path last"
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a loader runs ahead of the trainer; see `StreamProgress` for what was trained on.

        Lightning takes a loader without these two methods for one that starts again from the first sample.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing, see `state_dict`."""


class StreamProgress:
    """What the trainer has consumed: all that a run must save to go on with the next sample.

    Args:
        made_for: what the order of samples depends on, by the name that messages use; values are plain.
        lanes: of the plan.
        per_step: batches of an optimizer step, of all ranks together.
    """

    def __init__(self, made_for: Mapping[str, Any], lanes: int, per_step: int) -> None:
        self.made_for = dict(made_for)
        self.per_step = per_step
        self.steps, self.stage, self.lanes = 0, 0, first_places(lanes)
        self._own: Counter[str] = Counter()
        self._before: Counter[str] = Counter()
        self._pending: list[Mapping[str, Any]] = []

    def commit(self, origin: Mapping[str, Any]) -> None:
        """Take note of a batch of this rank that was trained on; it counts when its optimizer step is complete."""
        self._pending.append(origin)

    def end_step(self) -> list[Mapping[str, Any]]:
        """Make what was committed part of the state, and return it: the batches of this rank in this step."""
        done, self._pending = self._pending, []
        for origin in done:
            if origin["stage"] != self.stage:
                self.stage, self.lanes = origin["stage"], first_places(len(self.lanes))
            self.lanes[origin["lane"]] = Place(*origin["after"])
            self._own.update(origin["counts"])
        self.steps += 1
        return done

    def places(self, stage: int) -> list[Place]:
        """The next row of each lane in `stage`: where they stand, or their first if that is the next stage."""
        return list(self.lanes) if stage == self.stage else first_places(len(self.lanes))

    def own_state(self) -> dict[str, Any]:
        """What only this rank knows: places of its lanes, and its counts."""
        moved = {lane: tuple(place) for lane, place in enumerate(self.lanes) if place != Place(lane, 0)}
        return {"stage": self.stage, "lanes": moved, "counts": dict(self._own)}

    def state_dict(self, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the state of the run: plain values, some hundred bytes, the same whichever rank saves it.

        Args:
            ranks: `own_state` of every rank.
        """
        lanes: list[Place] = list(self.lanes)
        counts = Counter(self._before)
        for rank in ranks:
            counts.update(rank["counts"])
            for lane, place in rank["lanes"].items():
                # Lanes of other ranks stand where they were when this run began.
                lanes[lane] = max(lanes[lane], Place(*place))
        return {
            "version": VERSION,
            "made_for": dict(self.made_for),
            "steps": self.steps,
            "per_step": self.per_step,
            "stage": self.stage,
            # A lane's windows are its number and every `lanes` from there.
            "lanes": [[(place.window - lane) // len(lanes), place.row] for lane, place in enumerate(lanes)],
            "counts": dict(sorted(counts.items())),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, main: bool = True, changed_data: bool = False) -> None:
        """Go on from a saved state.

        Args:
            state: of `state_dict`, from any number of ranks.
            main: whether this rank holds the counts so far; one of them does.
            changed_data: go on although the order of samples is another one than it was.

        Raises:
            ConfigError: the state is of another version, or was saved for another order of samples.
        """
        if state.get("version") != VERSION:
            raise ConfigError(f"the checkpoint's data state has version {state.get('version')}, expected {VERSION}")
        self._check(state["made_for"], changed_data=changed_data)
        self.steps, self.stage = state["steps"], state["stage"]
        count = len(self.lanes)
        places = state["lanes"]
        if state["per_step"] != self.per_step and not changed_data:
            places = _with_other_batches(places, state["per_step"], self.per_step)
        if len(places) == count:
            self.lanes = [Place(lane + count * turn, row) for lane, (turn, row) in enumerate(places)]
        self._before = Counter(state["counts"] if main else {})

    def _check(self, before: Mapping[str, Any], *, changed_data: bool) -> None:
        if changed_data:
            return
        for name in sorted({*before, *self.made_for}):
            old, new = before.get(name), self.made_for.get(name)
            if old != new:
                raise ConfigError(
                    f"the checkpoint cannot be gone on with exactly: {name} was {old} and is now {new}. Restore it, or "
                    "set data.stream.allow_changes to go on with another order of samples"
                )

    @property
    def counts(self) -> Counter[str]:
        """What this rank counted, and, where it is the main one, what was counted before the run was resumed."""
        return self._before + self._own


def _with_other_batches(places: Sequence[Sequence[int]], before: int, now: int) -> list[tuple[int, int]]:
    """Where lanes stand if steps have `now` batches and not `before`, with the same samples in both.

    Raises:
        ConfigError: samples were left out of windows, so that these are no batches any more.
    """
    count = len(places)
    batches = sum(turn for turn, _ in places)
    if [tuple(place) for place in places] != [((batches - lane - 1) // count + 1, 0) for lane in range(count)]:
        raise ConfigError(
            f"the checkpoint was made with {before} batches per optimizer step, and this run has {now}; as samples "
            "were dropped, it can only go on with as many as before, or with data.stream.allow_changes"
        )
    batches = batches * now // before
    return [((batches - lane - 1) // count + 1, 0) for lane in range(count)]


def worker_death(error: BaseException | None) -> RunError | None:
    """What to say if `error` was raised because a worker process died, and None for any other one.

    torch raises it from a signal handler, wherever the trainer is at that moment, as a plain `RuntimeError`.
    """
    while error is not None:
        if type(error) is RuntimeError and _DEATH.match(str(error)):
            return RunError(f"the data workers failed: {error} Out of memory? Continue with --ckpt_path last")
        error = error.__cause__ or error.__context__
    return None


def _as_it_is(batch: Any) -> Any:
    return batch
