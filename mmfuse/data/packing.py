"""Fitting samples into a budget of tokens, media included: packing several into a row, and cutting those too long."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmfuse.errors import DataError
from mmfuse.models.chat import EncodedSample
from mmfuse.sequence import Modality, Role


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share samples among rows of at most `budget` tokens: best fit, the longest first.

    Args:
        lengths: tokens of each sample, media tokens included.
        budget: the longest row.

    Returns:
        For each row the numbers of its samples, in their order. Best fit decreasing needs at most 11/9 of the fewest
        rows possible, and one (Johnson, *Near-optimal bin packing algorithms*, 1973).

    Raises:
        ValueError: a sample that is longer than the budget.
    """
    if lengths and max(lengths) > budget:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a row of {budget}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each row, and its number; sorted
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        at = bisect_left(room, (lengths[number], 0))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = budget, len(rows)
            rows.append([])
        rows[row].append(number)
        insort(room, (left - lengths[number], row))
    return [sorted(row) for row in rows]


def truncate(sample: EncodedSample, limit: int) -> EncodedSample:
    """Return the first `limit` tokens of `sample`, or fewer: a medium that does not fit as a whole is left out.

    The result may have no supervised token left, see `is_supervised`, or be empty.

    Raises:
        DataError: the sample is too long, and of an adopted model, whose own processor is given whole chats.
    """
    if len(sample) <= limit:
        return sample
    if not isinstance(sample, EncodedSample):
        raise DataError(
            f"{sample.key}: {len(sample)} tokens, more than the {limit} that fit; the chats of an adopted model cannot "
            "be cut: set stream.too_long to drop, or make room"
        )
    modality, segment = sample.table[0], sample.table[2]
    cut = limit
    if modality[cut] != Modality.TEXT:
        # Media tokens of one medium share a segment, and no other token has it.
        cut = min(cut, int(np.flatnonzero(segment == segment[cut])[0]))
    kept = {}
    for name, items in sample.media.items():
        held = segment[:cut][modality[:cut] == Modality[name.upper()]]
        if count := len(np.unique(held)):
            kept[name] = items[:count]
    return replace(sample, input_ids=sample.input_ids[:cut], table=sample.table[:, :cut], media=kept)


def is_supervised(sample: EncodedSample) -> bool:
    """Whether there is any token that the model is taught to say."""
    return bool((sample.table[1] == Role.ANSWER).any())
