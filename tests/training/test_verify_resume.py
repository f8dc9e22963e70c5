"""`verify-resume` passes a run that resumes exactly, and names what is different in one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfuse.training.verify_resume import first_difference

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]


def run(folder: Path, losses: dict[int, str], samples: dict[int, list[list[str]]]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, "batches": batches}) + "\n" for step, batches in samples.items()]
    (folder / "samples.jsonl").write_text("".join(lines))
    rows = [f"{step},{loss}\n" for step, loss in losses.items()]
    (folder / "metrics.csv").write_text("step,train/loss\n" + "".join(rows))
    return folder


LOSSES, SAMPLES = {1: "2.5", 2: "2.25"}, {1: [["a/x", "a/y"]], 2: [["a/z"]]}


@pytest.mark.parametrize(
    ("losses", "samples", "says"),
    [
        (LOSSES, SAMPLES, None),
        ({**LOSSES, 2: "2.26"}, SAMPLES, "the loss of step 2 is 2.26 instead of 2.25"),
        ({1: "2.5"}, SAMPLES, "the loss of step 2 is None instead of 2.25"),
        (LOSSES, {**SAMPLES, 2: [["a/q"]]}, "step 2 was trained on a/q instead of a/z"),
        (LOSSES, {1: SAMPLES[1]}, "step 2 was trained on nothing instead of a/z"),
        (LOSSES, {**SAMPLES, 1: [["a/x"], ["a/y"]]}, "step 1 was trained on a/x, a/y instead of a/x, a/y"),
    ],
)
def test_first_difference(losses: Any, samples: Any, says: str | None, tmp_path: Path) -> None:
    assert first_difference(run(tmp_path / "whole", LOSSES, SAMPLES), run(tmp_path / "cut", losses, samples)) == says


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["verify-resume", "--config", "a.yaml", "--kills", "9", "--steps", "5"], "--kills must lie in 1..4"),
        (["verify-resume", "--config", "a.yaml", "--kils", "9"], "did you mean '--kills'"),
        (["chaos", "--config", "a.yaml", "--steps", "2"], "--steps must be at least 8"),
        (["chaos", "--config", "a.yaml", "--fault", "kil"], "unknown; known are kill, kill-ranks"),
        (["chaos"], "--config"),
    ],
)
def test_mistakes_in_the_request(words: list[str], says: str, mmfuse: Command) -> None:
    ran = mmfuse(*words)
    assert ran.code == 2 and says in ran.err


@pytest.mark.slow
def test_killed_run_is_the_whole_run(mmfuse: Command, write_config: WriteConfig, tmp_path: Path) -> None:
    words = ["--kills", "2", "--steps", "8", "--out", tmp_path / "out"]
    ran = mmfuse("verify-resume", "--config", write_config(), *words)
    assert ran.code == 0 and "PASSED" in ran.out, ran.err
