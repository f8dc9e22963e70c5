"""EEG: retrieval of what was seen, and events such as seizures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mmfuse.errors import DataError
from mmfuse.eval.scorers.records import Counts, Metric, Result, Row, Sample, clusters, identity, mean, ratio, required

#: The numbers of candidates that papers report.
WAYS = (2, 4, 10, 50, 100, 200)
Event = tuple[float, float]

#: SzCORE's settings, in seconds.
TOLERANCE_START, TOLERANCE_END = 30.0, 60.0
LONGEST_EVENT, SMALLEST_GAP = 300.0, 90.0
_EVENT_RATE, _SAMPLE_RATE = 10, 1
_DAY = 86_400.0


def retrieval(rows: Sequence[Row], protocol: str) -> Result:
    """k-way retrieval: is the right candidate among the first one, three, five?

    `prediction` holds the similarity to each candidate, `target` the number of the right one. Of equally similar
    candidates the earlier one ranks first. Papers draw k - 1 wrong candidates at random, unseeded; here stands what
    that gives on average, exactly: of the n - 1 wrong ones `b` are better, so the right one is among the first m with
    the probability that a draw of k - 1 holds fewer than m of the b.
    """
    ranks, sizes, samples = [], [], []
    for row in rows:
        similarity, target = _similarities(row)
        own = similarity[target]
        better = sum(value > own for value in similarity) + sum(value == own for value in similarity[:target])
        ranks.append(better)
        sizes.append(len(similarity))
        first = str(similarity.index(max(similarity)))
        samples.append(Sample(identity(row), float(better == 0), first, "rank", clusters(row, "subject")))
    pairs = list(zip(ranks, sizes, strict=True))
    metrics = {f"top{m}": mean(rank < m for rank in ranks) for m in (1, 3, 5)}
    metrics["chance_top1"] = mean(1 / size for size in sizes)
    for ways in (k for k in WAYS if k <= min(sizes)):
        for m in (1, 5):
            if m < ways:
                expected = [among_first(rank, size, ways, m) for rank, size in pairs]
                metrics[f"{ways}way_top{m}"] = mean(expected)
    return Result(tuple(samples), metrics)


def among_first(better: int, size: int, ways: int, first: int = 1) -> float:
    """The probability that the right candidate is among the first, when `ways` - 1 wrong ones are drawn.

    Args:
        better: wrong candidates that are more similar than the right one.
        size: of all candidates.
        ways: candidates in a draw, the right one included.
        first: how many places count.
    """
    drawn = sum(
        math.comb(better, seen) * math.comb(size - 1 - better, ways - 1 - seen) for seen in range(min(first, ways))
    )
    return drawn / math.comb(size - 1, ways - 1)


def _similarities(row: Row) -> tuple[list[float], int]:
    values, target = required(row, "prediction"), required(row, "target")
    numbers = isinstance(values, list) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    )
    if not numbers or len(values) < 2:
        raise DataError(f"row {identity(row)}: 'prediction' must hold finite similarities to two candidates or more")
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < len(values):
        raise DataError(f"row {identity(row)}: 'target' must be a candidate's number, 0 to {len(values) - 1}")
    return values, target


def events(rows: Sequence[Row], protocol: str) -> Result:
    """Events in recordings, as SzCORE scores seizures (Dan et al. 2024).

    `target` and `prediction` are lists of `[start, end]` in seconds, `duration` the length of the recording. By event:
    gaps below 90 s are closed, then events over 5 minutes cut; an event is found if anything overlaps it, 30 s before
    to 60 s behind; an answer is false if it touches no found one. By sample: at 1 Hz. `sensitivity`, `precision` and
    `f1` are not defined (NaN) without events to find, without answers, and without either.
    """
    samples, by_event, by_sample = [], [], []
    for row in rows:
        duration = _duration(row)
        wanted, given = (_events(row, key, duration) for key in ("target", "prediction"))
        counts = event_counts(wanted, given, duration)
        by_event.append((*counts, duration))
        by_sample.append((*sample_counts(wanted, given, duration), duration))
        found, false, there = counts
        own = 2 * found / (found + false + there) if found + false + there else None
        samples.append(Sample(identity(row), own, f"{len(given)} events", "events", clusters(row, "subject")))
    metrics: dict[str, Metric] = {}
    for prefix, counts_list in (("", by_event), ("sample_", by_sample)):
        held = np.array(counts_list, dtype=np.float64)
        metrics[f"{prefix}f1"] = Metric(held, _f1)
        metrics[f"{prefix}sensitivity"] = Metric(held[:, [0, 2]], ratio)
        metrics[f"{prefix}precision"] = Metric(held, _precision)
        if not prefix:
            metrics["false_per_day"] = Metric(held, lambda sums: _DAY * sums[..., 1] / sums[..., 3])
    return Result(tuple(samples), metrics)


def _precision(sums: Counts) -> Counts:
    return ratio(np.stack([sums[..., 0], sums[..., 0] + sums[..., 1]], -1))


def _f1(sums: Counts) -> Counts:
    # 2 tp / (2 tp + fp + fn) with fn = there - tp; not defined if there is nothing to find and nothing false.
    return ratio(np.stack([2 * sums[..., 0], sums[..., 0] + sums[..., 1] + sums[..., 2]], -1))


def event_counts(wanted: Sequence[Event], given: Sequence[Event], duration: float) -> tuple[int, int, int]:
    """Events found, answers that are false, and events to find."""
    wanted, given = (_cut(_closed(own)) for own in (wanted, given))
    size = round(duration * _EVENT_RATE)
    said, found_mask = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    place = _placer(_EVENT_RATE)
    for event in given:
        said[place(event)] = True
    found = 0
    for start, end in wanted:
        reach = max(0.0, start - TOLERANCE_START), min(size / _EVENT_RATE, end + TOLERANCE_END)
        if said[place(reach)].any():
            found += 1
            found_mask[place(reach)] = True
    false = sum(not found_mask[place(event)].any() for event in given)
    return found, false, len(wanted)


def sample_counts(wanted: Sequence[Event], given: Sequence[Event], duration: float) -> tuple[int, int, int]:
    """Seconds found, seconds that are false, and seconds to find, at 1 Hz."""
    there, said = (np.zeros(round(duration * _SAMPLE_RATE), dtype=bool) for _ in range(2))
    place = _placer(_SAMPLE_RATE)
    for mask, own in ((there, wanted), (said, given)):
        for event in own:
            mask[place(event)] = True
    return int((there & said).sum()), int((said & ~there).sum()), int(there.sum())


def _placer(rate: int) -> Callable[[Event], slice]:
    return lambda event: slice(round(event[0] * rate), round(event[1] * rate))


def _closed(own: Sequence[Event]) -> list[Event]:
    closed: list[Event] = []
    for start, end in own:
        if closed and start - closed[-1][1] < SMALLEST_GAP:
            closed[-1] = (closed[-1][0], end)
        else:
            closed.append((start, end))
    return closed


def _cut(own: Sequence[Event]) -> list[Event]:
    pieces = []
    for start, end in own:
        while end - start > LONGEST_EVENT:
            pieces.append((start, start + LONGEST_EVENT))
            start += LONGEST_EVENT
        pieces.append((start, end))
    return pieces


def _duration(row: Row) -> float:
    value = row.get("duration")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
        raise DataError(f"row {identity(row)}: 'duration' must be at least 1 second, got {value!r:.80}")
    return float(value)


def _events(row: Row, key: str, duration: float) -> list[Event]:
    value = required(row, key)
    try:
        own = sorted((float(start), float(end)) for start, end in value)
    except (TypeError, ValueError):
        raise DataError(f"row {identity(row)}: {key!r} must be a list of [start, end], got {value!r:.80}") from None
    for event, later in zip(own, [*own[1:], (duration, duration)], strict=False):
        if not 0 <= event[0] < event[1] <= later[0]:
            raise DataError(
                f"row {identity(row)}: events of {key!r} must not overlap or leave the recording, see {list(event)}"
            )
    return own
