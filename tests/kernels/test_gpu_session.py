"""The parts of the first GPU session that need no GPU: it refuses without one, and its oracle runs and can fail."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_session_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "gpu_session.sh")
    done = run("bash", script, str(tmp_path / "report"), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert "gpu_session: torch finds no GPU here" in done.stderr
    assert not (tmp_path / "report").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_session_is_clean_shell() -> None:
    done = run("shellcheck", "benchmarks/gpu_session.sh")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_oracle_runs_in_the_interpreter() -> None:
    arguments = "--device cpu --repeats 2 --lengths 70 --head-dims 64 --masks mma --dtypes bfloat16 --heads 2 1"
    done = run(sys.executable, "benchmarks/gpu_oracle.py", *arguments.split(), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "mma 70 × 64 bfloat16: right"


@pytest.mark.slow
def test_the_benchmark_runs_below_the_length_of_a_whole_image() -> None:
    arguments = "--lengths 96 --heads 2 --head-dim 16 --rounds 1 --masks no_image_to_image window_2d"
    done = run(sys.executable, "benchmarks/attention.py", *arguments.split())
    assert done.returncode == 0, done.stdout + done.stderr
    _, ours, windows = done.stdout.splitlines()
    assert ours.startswith("no_image_to_image") and "rectangles" in ours and "forward only" in ours
    assert windows.startswith("window_2d") and "| rectangles" not in windows and "forward only" in windows


def test_rates_stand_beside_peak_and_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cards = importlib.import_module("cards")
    # 989 TFLOP in 4 s and 2.5 times that in 10 s: a quarter of the peak each.
    told = cards.beside_goals("causal", 128, 989 * 10**12, 4.0, 10.0, "NVIDIA H100 80GB HBM3")
    assert told == "247 / 247 / 247 TFLOP/s (25% / 25% / 25% of 989), goal 430 / 280 / -"
    assert cards.beside_goals("mma", 64, 10**13, 1.0, 1.0, "another card") == "10 / 25 / 18 TFLOP/s"
    assert cards.ratio_goals("mma", 128, "NVIDIA H100 PCIe") == "goals for triton: 1.4 / 1.4 × flex, 6 / 4 × sdpa"
    assert not cards.ratio_goals("causal", 128, "NVIDIA H100 PCIe") and not cards.ratio_goals("mma", 128, "A100")
