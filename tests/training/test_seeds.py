"""Dropout draws the same numbers at the same step, whatever was drawn before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.training.callbacks import StepSeeds, hashed_seed
from mmfuse.training.checkpoints import read_checkpoint
from mmfuse.training.module import MultimodalModule

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]
ReadRows = Callable[[Path], list[dict[str, float]]]


class Crash(Exception):
    """The machine fails."""


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4), st.integers(0, 3))
def test_seeds_of_neighbours_differ(numbers: list[int], place: int) -> None:
    other = list(numbers)
    other[place % len(other)] += 1
    seeds = {hashed_seed(*numbers), hashed_seed(*other), hashed_seed(*numbers, 0)}
    assert len(seeds) == 3 and all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_those_of_earlier_versions() -> None:
    """Another hash would make every run that goes on another one."""
    assert hashed_seed(0, 0, 0, 0) == 8000154919901005727
    assert hashed_seed(1, 2, 3, 4) == 2930429999423258495


@pytest.mark.parametrize("ranks", [2, 4])
def test_batch_draws_the_same_on_any_number_of_ranks(ranks: int) -> None:
    """Four batches a step, numbered as the plan deals them out: batch `micro * ranks + rank` to a rank."""

    def drawn(world: int) -> dict[int, float]:
        found = {}
        for rank in range(world):
            seeds = StepSeeds(7)
            for number in range(0, 12, world):
                trainer = SimpleNamespace(global_step=number // 4, world_size=world, global_rank=rank)
                seeds.on_train_batch_start(trainer, None, None, number // world)  # type: ignore[arg-type]
                found[number + rank] = float(torch.rand(()))
        return found

    one, other = drawn(1), drawn(ranks)
    assert one == other and len(set(one.values())) == 12


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 2), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_dropout_goes_on_as_if_nothing_had_happened(
    workers: int,
    accumulate: int,
    mmfuse: Command,
    write_config: WriteConfig,
    tmp_path: Path,
    read_rows: ReadRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole run without workers; the run that is cut, with some; it crashes behind a checkpoint."""
    config = write_config(
        {
            "checkpoint_every": 2,
            "trainer": {"accumulate_grad_batches": accumulate},
        }
    )
    original = MultimodalModule.training_step
    crashes = [5]

    def step(self: MultimodalModule, batch: Any, batch_idx: int) -> Any:
        if crashes and self.global_step == crashes[0] and broken:
            crashes.clear()
            raise Crash
        # Dropout where every sample passes: behind the connector.
        if not getattr(self, "dropping", False):
            self.network.connectors["image"].register_forward_hook(
                lambda module, inputs, output: torch.nn.functional.dropout(output, 0.5)
            )
            self.dropping = True
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MultimodalModule, "training_step", step)
    broken = False
    assert mmfuse("fit", "--config", config, "--out", tmp_path / "whole").code == 0
    broken = True
    words = ["fit", "--config", config, "--out", tmp_path / "cut", "--data.num_workers", str(workers)]
    with pytest.raises(Crash):
        mmfuse(*words)
    assert mmfuse(*words, "--ckpt_path", "last").code == 0
    losses = [[row["train/loss"] for row in read_rows(tmp_path / run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    states = [read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt")["state_dict"] for run in ("whole", "cut")]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
