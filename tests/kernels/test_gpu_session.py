"""The parts of the first GPU session that need no GPU: it refuses without one, and its oracle runs and can fail."""

from __future__ import annotations

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
