"""Choosing launches by measurement: what is timed, what is refused, and the file that keeps the choice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mmfuse.errors import ConfigError, RunError
from mmfuse.kernels.plan import BlockPlan
from mmfuse.kernels.triton import tuning
from mmfuse.kernels.triton.launch import Launch, launch_of, shortlist
from mmfuse.kernels.triton.measure import TUNED, measure_launches
from mmfuse.kernels.triton.tuning import Trial, fastest, keep, try_launches, tuned_launch
from mmfuse.training.kernels import main, trial_table

GPU = "NVIDIA H100 80GB HBM3"
FIRST, SECOND, THIRD = Launch(64, 64, 4), Launch(64, 32, 4), Launch(32, 32, 4)


def test_the_fastest_of_those_that_are_right_is_taken() -> None:
    """The third is fastest, but wrong; the second does not fit the GPU."""
    results = {FIRST: torch.ones(4), THIRD: torch.full((4,), 2.0), Launch(32, 64, 4): torch.ones(4) + 1e-3}
    milliseconds = {FIRST: 3.0, THIRD: 1.0, Launch(32, 64, 4): 2.0}
    timed: list[Launch] = []

    def run(launch: Launch) -> list[Tensor]:
        if launch == SECOND:
            raise OutOfResources(300000, 232448, "shared memory")
        timed.append(launch)
        return [results[launch]]

    def time(call: Callable[[], Any]) -> float:
        call()
        return milliseconds[timed[-1]]

    trials = try_launches([FIRST, SECOND, THIRD, Launch(32, 64, 4)], run, time)
    assert [trial.time for trial in trials] == [3.0, None, None, 2.0]
    assert "shared memory" in str(trials[1].problem) and "other numbers" in str(trials[2].problem)
    assert fastest(trials) == Launch(32, 64, 4)
    assert fastest(trials[1:3]) is None


def test_rows_that_see_nothing_do_not_count_as_wrong() -> None:
    lse = torch.tensor([-torch.inf, 1.0])
    assert try_launches([FIRST, SECOND], lambda _: [lse], lambda _: 1.0)[1].time == 1.0


def test_every_launch_of_the_shortlist_computes_the_same(by_force: Callable[..., BlockPlan]) -> None:
    """In the interpreter, on whole and partial blocks, with a group of two."""
    seen = torch.ones(1, 100, 100, dtype=torch.bool).tril()
    seen[:, :64, :64] = True
    q, k, v = (torch.randn(1, heads, 100, 16) for heads in (2, 1, 1))
    found = measure_launches(q, k, v, by_force(seen), lambda run: 1.0)
    assert set(found) == set(TUNED)
    for kernel, trials in found.items():
        assert [trial.launch for trial in trials] == list(shortlist(kernel, 16, 4, amd=False))
        assert all(trial.problem is None for trial in trials)


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kernel", TUNED)
def test_the_shortlist_begins_with_the_table_and_fits_the_plan(kernel: str, head_dim: int, amd: bool) -> None:
    found = shortlist(kernel, head_dim, 2, amd=amd)
    assert found[0] == launch_of(kernel, head_dim, 2, amd=amd)
    assert len(set(found)) == len(found) > 2
    assert all(64 % launch.rows == 0 and 64 % launch.columns == 0 for launch in found)


def test_what_is_kept_is_found_again_on_the_same_gpu_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cache" / "launches.json"
    assert tuned_launch("dq", 128, 2, GPU, file) is None
    keep("dq", 128, 2, GPU, FIRST, file)
    keep("forward", 64, 2, GPU, SECOND, file)
    keep("dq", 128, 2, GPU, THIRD, file)
    assert tuned_launch("dq", 128, 2, GPU, file) == tuned_launch("dq", 96, 2, GPU, file) == THIRD
    assert tuned_launch("forward", 64, 2, GPU, file) == SECOND
    for other in (("dq", 128, 4, GPU), ("dq", 64, 2, GPU), ("dkv", 128, 2, GPU), ("dq", 128, 2, "NVIDIA A100")):
        assert tuned_launch(*other, file) is None
    assert os.listdir(file.parent) == ["launches.json"]
    monkeypatch.setattr(tuning, "__version__", "another")
    assert tuned_launch("dq", 128, 2, GPU, file) is None


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"b": [1, 2]}}', '{"a": {"b": "wide"}}', '{"a": 3}'])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    file.write_text(text)
    with pytest.raises(RunError, match=r"launches\.json: expected launches by GPU and kernel"):
        tuned_launch("dq", 128, 2, GPU, file)


def test_the_command_measures_on_a_gpu_alone() -> None:
    with pytest.raises(ConfigError, match="--tune measures on a GPU: it needs --device cuda"):
        main(["kernels", "--tune", "--length", "64"])


def test_the_table_of_trials_says_what_became_of_each() -> None:
    table = trial_table("dq", [Trial(FIRST, 2.0), Trial(SECOND, 1.0), Trial(THIRD, None, "does not fit")], SECOND)
    assert list(table.columns[4].cells) == ["2.000", "1.000", ""]
    assert list(table.columns[5].cells) == ["built in", "fastest", "does not fit"]
