"""Which samples a window holds, as a pure function of its number: a run that starts anywhere goes on exactly.

The samples of a stage form one endless sequence of *slots*. A slot's number tells its source, and how often that source
was drawn from before; the n-th draw of a source is one element of its shuffled order, another one in every epoch.
Consecutive slots form *windows*. What is made of a window (batches, packed rows) depends on that window alone, and
*lanes* take windows in turn: lane `l` of `L` has the windows l, l + L, l + 2 L, ... Batch number `t` of a stage,
counted over all ranks, comes from lane `t % L`. So ranks and workers need not know of each other, and their number may
change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from mmfuse.data.shuffle import BLOCK, BlockShuffle, number_of, permutation
from mmfuse.errors import ConfigError, unknown

#: Weights are rounded to multiples of 1 / RESOLUTION: integers of this size count 5e11 slots without rounding.
RESOLUTION: Final = 1 << 24
#: Where windows and batches are not the same, nobody knows how often an earlier stage drew: a stage begins new epochs.
_EPOCHS_OF_A_STAGE: Final = 1 << 20


class Draw(NamedTuple):
    """One sample of a mixture: its source, its number there, and how often the source was gone through before."""

    source: str
    sample: int
    epoch: int

    def generator(self, seed: int) -> np.random.Generator:
        """Random numbers of this draw alone, wherever and whenever it is made."""
        return np.random.Generator(np.random.PCG64(number_of(seed, *self)))


@dataclass(frozen=True)
class StagePlan:
    """A stretch of training with fixed weights.

    Attributes:
        weights: share of each source among the samples; need not sum to one.
        batches: how many batches all ranks get together.
    """

    weights: Mapping[str, float]
    batches: int


class Plan:
    """The windows of all stages.

    Over any run of slots, each source's share is within a few samples of its weight. Every sample of a source is drawn
    once before any is drawn again.

    Args:
        parts: for each source the number of samples in each of its shards.
        stages: what to draw, one stage after the other.
        window: samples in a window.
        seed: of all orders.
        lanes: over which windows are dealt.
        window_is_batch: every window becomes one batch. Then stages continue each other's epochs. Otherwise each stage
            goes through its sources anew, and the first window of each lane is shorter, so that lanes do not open their
            next ones all at the same time.
        block: samples of a source that are shuffled together.

    Raises:
        ConfigError: a weight of a source that does not exist, negative weights or none, an empty source, or numbers out
            of range.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[int]],
        stages: Sequence[StagePlan],
        *,
        window: int,
        seed: int = 0,
        lanes: int = 1,
        window_is_batch: bool = True,
        block: int = BLOCK,
    ) -> None:
        sizes = {name: sum(counts) for name, counts in parts.items()}
        _check(sizes, stages)
        if window < 1 or seed < 0 or lanes < 1:
            raise ConfigError(f"expected window >= 1, lanes >= 1 and seed >= 0, got {window}, {lanes} and {seed}")
        self.sizes, self.seed, self.lanes, self.size = sizes, seed, lanes, window
        self.starts = [0, *np.cumsum([stage.batches for stage in stages]).tolist()]
        self._mixtures = [_Mixture(stage.weights) for stage in stages]
        self._shuffles = {name: BlockShuffle(counts, name, seed, block) for name, counts in parts.items()}
        first = [window] * lanes if window_is_batch else [max(1, window * (lane + 1) // lanes) for lane in range(lanes)]
        self._begins = [0, *np.cumsum(first).tolist()]
        # Draws of each source before each stage.
        self._drawn = [dict.fromkeys(sizes, 0)]
        for mixture, stage in zip(self._mixtures, stages, strict=True):
            counts = mixture.counts(stage.batches * window)
            before = self._drawn[-1]
            self._drawn.append(
                {name: before[name] + counts.get(name, 0) for name in sizes}
                if window_is_batch
                else {name: before[name] + _EPOCHS_OF_A_STAGE * size for name, size in sizes.items()}
            )

    def __len__(self) -> int:
        """Return the number of batches of all stages and ranks."""
        return int(self.starts[-1])

    def stage_of(self, batch: int) -> int:
        """Return the number of the stage that `batch` belongs to.

        Raises:
            IndexError: the plan has no such batch.
        """
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of a plan with {len(self)} batches")
        return int(np.searchsorted(self.starts, batch, side="right")) - 1

    def lane_of(self, batch: int) -> tuple[int, int]:
        """Return the stage of `batch`, and the lane that it comes from."""
        stage = self.stage_of(batch)
        return stage, (batch - self.starts[stage]) % self.lanes

    def samples_of(self, stage: int) -> int:
        """Return how many samples the sources of a stage have together."""
        return sum(self.sizes[name] for name in self._mixtures[stage].names)

    def window(self, stage: int, number: int) -> list[Draw]:
        """The samples of one window of a stage, shuffled: the regular sequence would have a pattern of sources."""
        begin, end = self._begin(number), self._begin(number + 1)
        names, draws = self._mixtures[stage].draws(begin, end - begin)
        found: list[Draw] = []
        for name, draw in zip(names, draws, strict=True):
            epoch, index = self._shuffles[name](self._drawn[stage][name] + draw)
            found.append(Draw(name, index, epoch))
        return [found[slot] for slot in permutation([self.seed, self.starts[stage] + number], len(found)).tolist()]

    def _begin(self, number: int) -> int:
        """The first slot of a window."""
        if number <= self.lanes:
            return int(self._begins[number])
        return int(self._begins[-1]) + (number - self.lanes) * self.size


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
