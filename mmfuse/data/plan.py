"""Which sample goes where, as a pure function of the position: a run that starts anywhere goes on exactly.

The samples of all ranks and stages form one sequence of *slots*. A slot's number tells its source, and how often that
source was drawn from before; the n-th draw of a source is one element of a permutation of the source, another one in
every epoch.
Nothing is carried along, so there is no state to be saved but the number of batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from mmfuse.data.samples import Sample
from mmfuse.data.sources import Source
from mmfuse.errors import ConfigError, unknown

#: Weights are rounded to multiples of 1 / RESOLUTION: integers of this size count 5e11 slots without rounding.
RESOLUTION: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """One sample of a mixture: its source, and its number there."""

    source: str
    index: int


@dataclass(frozen=True)
class StagePlan:
    """A stretch of training with fixed weights.

    Attributes:
        weights: share of each source among the samples; need not sum to one.
        batches: how many batches each rank gets.
    """

    weights: Mapping[str, float]
    batches: int


class BatchPlan(Sampler[list[SampleIndex]]):
    """Batches of sample indices for one rank, for `DataLoader(batch_sampler=...)`.

    Over any window of slots, each source's share is within a few samples of its weight. Every sample of a source is
    drawn once before any is drawn again, also across stages. `world` ranks with batches of `b` draw, step by step, the
    same samples as one rank with batches of `world * b`.

    Args:
        sizes: number of samples of each source.
        stages: what to draw, one stage after the other.
        batch_size: samples in a batch of one rank.
        seed: of the permutations; the same on all ranks.
        rank, world: which rank this is, of how many.
        start: first batch that is yielded; the earlier ones were trained on before.

    Raises:
        ConfigError: a weight of a source that does not exist, negative weights or none, an empty source, or numbers out
            of range.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        stages: Sequence[StagePlan],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        _check(sizes, stages)
        _check_numbers(batch_size, seed, rank, world)
        self.sizes, self.batch_size, self.seed, self.rank, self.world = dict(sizes), batch_size, seed, rank, world
        self._ends = np.cumsum([stage.batches for stage in stages])
        self._mixtures = [_Mixture(stage.weights) for stage in stages]
        if not 0 <= start <= len(self):
            raise ConfigError(f"start must be between 0 and the number of batches {len(self)}, got {start}")
        self.start = start
        # Draws of each source before each stage, and before the end.
        self._drawn = [dict.fromkeys(self.sizes, 0)]
        for mixture, stage in zip(self._mixtures, stages, strict=True):
            counts = mixture.counts(stage.batches * batch_size * world)
            self._drawn.append({name: before + counts.get(name, 0) for name, before in self._drawn[-1].items()})

    def __len__(self) -> int:
        """Return the number of batches of all stages, wherever this plan starts."""
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        orders: dict[str, tuple[int, NDArray[np.int64]]] = {}
        for batch in range(self.start, len(self)):
            yield self._batch(batch, orders)

    def stage_of(self, batch: int) -> int:
        """Return the number of the stage that `batch` belongs to.

        Raises:
            IndexError: the plan has no such batch.
        """
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of a plan with {len(self)} batches")
        return int(np.searchsorted(self._ends, batch, side="right"))

    def epochs(self) -> dict[str, float]:
        """Return how often each source is gone through over the whole plan, by all ranks together."""
        return {name: self._drawn[-1][name] / size for name, size in self.sizes.items()}

    def _batch(self, batch: int, orders: dict[str, tuple[int, NDArray[np.int64]]]) -> list[SampleIndex]:
        """One batch; `orders` keeps the order of each source's current epoch from one call to the next."""
        stage = self.stage_of(batch)
        whole = self.batch_size * self.world
        first = (batch - (int(self._ends[stage - 1]) if stage else 0)) * whole
        names, draws = self._mixtures[stage].draws(first, whole)
        # Shuffled before ranks take their parts: in the regular sequence, one rank might always meet the same source.
        order = _order([self.seed, batch], whole)[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        chosen = {}
        # In the order of draws, so that one epoch's order at a time will do.
        for slot in np.sort(order).tolist():
            name = names[slot]
            epoch, place = divmod(self._drawn[stage][name] + draws[slot], self.sizes[name])
            if name not in orders or orders[name][0] != epoch:
                orders[name] = (epoch, _order([self.seed, _number(name), epoch], self.sizes[name]))
            chosen[slot] = SampleIndex(name, int(orders[name][1][place]))
        return [chosen[slot] for slot in order.tolist()]


class MixtureDataset(Dataset[Sample]):
    """Samples of several sources by `SampleIndex`.

    Args:
        sources: by the names that the plan's weights use.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.sources = dict(sources)

    def __getitem__(self, index: SampleIndex) -> Sample:
        if index.source not in self.sources:
            raise ConfigError(unknown("source", index.source, self.sources))
        return self.sources[index.source][index.index]


class _Mixture:
    """Sources interleaved by weight: slot `t` goes to the first source whenever `floor(t * share + 1/2)` rises there.

    The slots that it leaves are numbered anew and shared among the other sources in the same way. So the draws of a
    source before any slot are known in closed form, in integers.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = math.fsum(weights.values())
        # The largest first: what a source is off by is handed to those behind it, and shrinks with their share.
        self.names = sorted(
            (name for name, weight in weights.items() if weight > 0), key=lambda name: (-weights[name], name)
        )
        shares = [max(1, round(weights[name] / total * RESOLUTION)) for name in self.names]
        self._rest = np.cumsum(shares[::-1])[::-1].tolist()
        self._shares = shares

    def counts(self, slots: int) -> dict[str, int]:
        """How often each source is drawn from in the first `slots` slots."""
        counts = {}
        for name, share, rest in zip(self.names, self._shares, self._rest, strict=True):
            counts[name] = (slots * share + rest // 2) // rest
            slots -= counts[name]
        return counts

    def draws(self, first: int, slots: int) -> tuple[list[str], list[int]]:
        """For each of the `slots` slots from `first` on: its source, and how often that was drawn from before."""
        source = np.zeros(slots, dtype=np.int64)
        before = np.zeros(slots, dtype=np.int64)
        open_slots, at = np.arange(slots), np.arange(first, first + slots + 1)
        for number, (share, rest) in enumerate(zip(self._shares, self._rest, strict=True)):
            counts = (at * share + rest // 2) // rest
            taken = np.diff(counts) > 0
            source[open_slots[taken]], before[open_slots[taken]] = number, counts[:-1][taken]
            at = np.append((at - counts)[:-1][~taken], at[-1] - counts[-1])
            open_slots = open_slots[~taken]
        return [self.names[number] for number in source.tolist()], before.tolist()


def _order(seed: Sequence[int], size: int) -> NDArray[np.int64]:
    """A permutation `[size]`. NumPy promises raw bits to stay as they are, its own `permutation` may change."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size), kind="stable")


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _check(sizes: Mapping[str, int], stages: Sequence[StagePlan]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"source {name!r} is empty; leave it out")
    if not stages:
        raise ConfigError("a plan needs at least one stage")
    for number, stage in enumerate(stages):
        if stage.batches < 1:
            raise ConfigError(f"stage {number}: batches must be at least 1, got {stage.batches}")
        for name, weight in stage.weights.items():
            if name not in sizes:
                raise ConfigError(f"stage {number}: {unknown('source', name, sizes)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"stage {number}: the weight of {name!r} must be a number from 0 on, got {weight}")
        if not any(weight > 0 for weight in stage.weights.values()):
            raise ConfigError(f"stage {number}: all weights are zero; at least one source needs a positive weight")


def _check_numbers(batch_size: int, seed: int, rank: int, world: int) -> None:
    if batch_size < 1 or seed < 0:
        raise ConfigError(f"expected batch_size >= 1 and seed >= 0, got {batch_size} and {seed}")
    if not 0 <= rank < world:
        raise ConfigError(f"expected 0 <= rank < world, got rank {rank} of {world}")
