"""Every fault of `mmfuse chaos` ends as it should, and a fault that does not makes the command fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfuse.data.decoders import decode_file
from mmfuse.data.sources import open_source
from mmfuse.errors import DataError
from mmfuse.training.chaos import command
from mmfuse.training.chaos.bench import Bench, Outcome
from mmfuse.training.chaos.command import FAULTS, Fault
from mmfuse.training.chaos.disk import flip_bit
from mmfuse.training.chaos.injected import DamagedSource, FlakySource
from mmfuse.training.chaos.payloads import payloads
from mmfuse.training.checkpoints import AtomicCheckpointIO, damage

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]

STEPS = "12"
#: Run in one call, over one whole run; the others are `exhaustive`: each is several processes of three seconds.
SAMPLED = ("worker-kill", "flaky-reads", "not-a-number", "payloads")
NAMES = [payload.name for payload in payloads(Path("marker"))]


@pytest.fixture
def config(write_config: WriteConfig, settings: dict[str, Any]) -> Path:
    """Two stages that are longer than a run of a fault."""
    stages = [{**settings["stages"][0], "steps": 5}, {**settings["stages"][1], "steps": 200}]
    return write_config({"stages": stages})


def test_flipped_bit_lies_in_a_record(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({f"w{n}": torch.zeros(3) for n in range(50)}, path)
    flip_bit(path)
    assert damage(path) is not None


@pytest.mark.parametrize("name", NAMES)
def test_payload_is_refused_and_runs_nothing(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "code_ran"
    (payload,) = (one for one in payloads(marker) if one.name == name)
    with pytest.raises(DataError):
        if payload.ending is None:
            open_source(payload.data.decode())
        else:
            decode_file(payload.data, payload.ending, "shard:key")
    assert not marker.exists()


def test_a_fault_that_ends_otherwise_makes_the_command_fail(
    mmfuse: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(bench: Bench, name: str) -> Outcome:
        return Outcome(name == "kill", f"{name} with {bench.steps} steps")

    faults = {name: Fault("what", "expected", make) for name in ("kill", "terminate")}
    monkeypatch.setattr(command, "FAULTS", faults)
    words = ["chaos", "--config", "a.yaml", "--steps", "9"]
    ran = mmfuse(*words, "--out", tmp_path / "both")
    assert ran.code == 1 and "1 of 2 faults did not end as they should: terminate" in ran.err
    assert "kill with 9 steps" in ran.out and "pass" in ran.out and "FAIL" in ran.out
    assert mmfuse(*words, "--out", tmp_path / "one", "--fault", "kill").code == 0


def test_documentation_lists_every_fault() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in FAULTS)


class Numbers:
    """Ten documents."""

    name = "numbers"
    parts = (10,)

    def __len__(self) -> int:
        return 10

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Any:
        from mmfuse.data import Sample

        return Sample(str(index), (), None, f"number {index}", {})

    __getitem__ = read

    def fingerprint(self) -> str:
        return "numbers"


def test_injected_faults_are_what_they_say() -> None:
    flaky = FlakySource(Numbers(), every=5)
    failed = []
    for index in range(10):
        try:
            flaky.read(index)
        except OSError:
            failed.append(index)
            assert flaky.read(index).text == f"number {index}"
    assert failed == [0, 5]
    damaged = DamagedSource(Numbers(), every=5)
    with pytest.raises(DataError):
        damaged.read(5)
    assert damaged[4].text == "number 4" and len(damaged) == 10 and damaged.parts == (10,)


@pytest.mark.slow
def test_sample_of_the_faults(mmfuse: Command, config: Path, tmp_path: Path) -> None:
    faults = [word for name in SAMPLED for word in ("--fault", name)]
    ran = mmfuse("chaos", "--config", config, "--steps", STEPS, "--out", tmp_path / "out", *faults)
    assert ran.code == 0, ran.out + ran.err
    assert ran.out.count("pass") == len(SAMPLED)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in SAMPLED])
def test_every_other_fault(name: str, mmfuse: Command, config: Path, tmp_path: Path) -> None:
    ran = mmfuse("chaos", "--config", config, "--steps", STEPS, "--out", tmp_path / "out", "--fault", name)
    assert ran.code == 0, ran.out + ran.err
