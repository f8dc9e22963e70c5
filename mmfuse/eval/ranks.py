"""Several processes that evaluate together, as `torchrun` starts them: each answers a share of the batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed

from mmfuse.errors import RunError


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all.

    Attributes:
        rank: from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What `torchrun` says in RANK and WORLD_SIZE, joined over gloo; one process without them.

        Only text is exchanged, so gloo does on machines with GPUs, too.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def gather(self, own: Any) -> list[Any]:
        """The objects of all ranks, on every rank; also a barrier."""
        if self.world == 1:
            return [own]
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, own)
        return parts

    def check(self, failure: str | None) -> None:
        """Wait for all ranks and end everywhere if one has failed, in place of a deadlock.

        Raises:
            RunError: on the ranks that did not fail themselves, naming those that did.
        """
        failures = {rank: text for rank, text in enumerate(self.gather(failure)) if text is not None}
        if failures and failure is None:
            raise RunError("; ".join(f"rank {rank} failed: {text}" for rank, text in failures.items()))

    def close(self) -> None:
        """Leave the group that `from_environment` joined."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
