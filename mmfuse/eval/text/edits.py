"""The edit distance of two sequences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions that turn one into the other (Levenshtein 1966).

    Computed column by column in the bits of one long integer (Myers 1999, in the form of Hyyrö 2003), so a caption
    takes microseconds and a page of text milliseconds.
    """
    if not first:
        return len(second)
    places: dict[Hashable, int] = {}
    for place, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << place
    full, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    # Bits of `up` and `down`: where the distance grows or falls by 1 from one row of the table to the next.
    up, down, distance = full, 0, len(first)
    for item in second:
        same = places.get(item, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        grows, falls = down | (~(diagonal | up) & full), diagonal & up
        distance += bool(grows & last) - bool(falls & last)
        grows = ((grows << 1) | 1) & full
        falls = (falls << 1) & full
        up, down = falls | (~(diagonal | grows) & full), grows & diagonal
    return distance
