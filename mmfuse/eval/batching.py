"""Which items are answered together: equally long ones, within a budget of tokens, the same whoever answers them.

The plan depends on the items and the budget alone. Ranks share its batches and never cut them anew, and a run that was
killed goes on with the same ones: matrices of the same shape give the same last bits, so that world size and kills
cannot change an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")

#: What torch says on the CPU, where running out of memory has no exception of its own.
_CPU_MEMORY = "can't allocate memory"


@dataclass(frozen=True)
class Batch:
    """Items that are answered together.

    Attributes:
        items: their places in the task.
        cost: tokens with padding.
    """

    items: tuple[int, ...]
    cost: int


def plan_batches(
    lengths: Sequence[Sequence[int]], budget: int, *, extra: int = 0, most: int | None = None
) -> list[Batch]:
    """Batches of items of similar length, the longest first, so that one that does not fit fails at once.

    Args:
        lengths: for each item the tokens of each of its rows; the rows of an item stay together.
        budget: tokens of a batch with padding; an item that is larger alone is a batch of its own.
        extra: tokens that each row may grow by.
        most: items of a batch at most.

    Raises:
        ValueError: a budget or a number of items below 1, or an item without rows.
    """
    if budget < 1 or (most is not None and most < 1):
        raise ValueError(f"a batch needs a budget and at least one item, got budget {budget}, at most {most} items")
    if not all(lengths):
        raise ValueError("an item without rows cannot be planned")
    order = sorted(range(len(lengths)), key=lambda item: (-max(lengths[item]), item))
    batches: list[Batch] = []
    members: list[int] = []
    rows = widest = 0
    for item in order:
        # Sorted by the longest row, so the first member is the widest.
        width = widest if members else max(lengths[item]) + extra
        cost = (rows + len(lengths[item])) * width
        if members and (cost > budget or len(members) == most):
            batches.append(Batch(tuple(members), rows * widest))
            members, rows = [], 0
            width = max(lengths[item]) + extra
        members.append(item)
        rows, widest = rows + len(lengths[item]), width
    if members:
        batches.append(Batch(tuple(members), rows * widest))
    return batches


class Backoff:
    """Runs batches and halves those that do not fit into memory.

    Attributes:
        halved: how often; where it is not 0, answers may differ in their last bits from those of a larger machine.
    """

    def __init__(self) -> None:
        self.halved = 0

    def run(self, items: Sequence[int], call: Callable[[Sequence[int]], list[Result]]) -> list[Result]:
        """`call(items)`, or the results of its halves.

        Raises:
            torch.OutOfMemoryError: a single item does not fit.
        """
        try:
            return call(items)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(items) == 1:
                raise
        # Outside of the handler, whose traceback keeps the tensors of the failed batch alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.halved += 1
        middle = (len(items) + 1) // 2
        return self.run(items[:middle], call) + self.run(items[middle:], call)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_MEMORY in str(error)
