"""What the compilers make of the kernels for GPUs that are not here: registers, memory, instructions.

The bounds stand in `kernel_budget.json`: for each kernel and head dim the instructions of its two inner loops, of full
tiles and of partial ones, with triton 3.8.0 and its ptxas 12.9. After a change that is meant, write them anew:

    python tests/kernels/aot_report.py budget > tests/kernels/kernel_budget.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
BUDGET = json.loads((HERE / "kernel_budget.json").read_text())
#: Bytes that a block may ask for: the limits of A100, H100, B200 and MI300.
SHARED = {"sm_75": 65536, "sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
#: The tensor-core instruction of each architecture, and where a kernel does without the newest.
TENSOR = {"sm_75": "mma", "sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
OLDER = {"dkv 256": "mma", "dkv+ 256": "mma", "decode 64": "mma", "decode 128": "mma", "decode 256": "mma"}
SLACK = 1.05


def reports(architecture: str, *cases: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "aot_report.py"), architecture, *cases]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(report: dict[str, Any], budget: list[int] | None) -> list[str]:
    """What is wrong with a compiled kernel."""
    architecture, kernel, head_dim, _ = report["name"].split()
    found = [f"{report[what]} {what}" for what in ("stack", "spills", "atomics") if report[what]]
    if report["shared"] > SHARED[architecture]:
        found.append(f"{report['shared']} bytes of shared memory, and there are {SHARED[architecture]}")
    nvidia = architecture.startswith("sm_")
    if nvidia and report["registers"] * 32 * report["launch"][2] > 65536:
        found.append(f"{report['registers']} registers a thread")
    if kernel != "delta":
        tensor = TENSOR[architecture]
        if nvidia and tensor != "mma":
            tensor = OLDER.get(f"{kernel} {head_dim}", tensor)
        found += [] if report[tensor] else [f"no {tensor}"]
        others = {"mma", "wgmma", "tcgen05"} & set(report) - {tensor}
        found += [f"falls back to {other}" for other in others if report[other]]
    if budget is not None:
        if len(report["loops"]) != len(budget):
            found.append(f"loops {report['loops']}, expected {budget}")
        pairs = zip(report["loops"], budget, strict=False)
        found += [f"a loop of {mine} instructions, budget {most}" for mine, most in pairs if mine > SLACK * most]
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_within_their_budget(architecture: str) -> None:
    budgets = BUDGET[architecture]
    found = {report["name"]: faults(report, budgets[case]) for case, report in zip(
        budgets, reports(architecture, *budgets), strict=True
    )}  # fmt: skip
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_every_kernel_and_head_dim_has_a_budget() -> None:
    heads = (64, 80, 96, 128, 256)
    wanted = {f"{kernel}:{dim}" for kernel in ("forward", "dq", "dkv") for dim in heads}
    wanted |= {f"{kernel}:{dim}" for kernel in ("delta", "decode") for dim in (64, 128, 256)}
    wanted |= {f"{kernel}+:{dim}" for kernel in ("forward", "dq", "dkv", "statistics") for dim in (64, 128, 256)}
    for cases in BUDGET.values():
        assert wanted <= set(cases)


def test_the_checks_catch_a_gpu_without_enough_of_anything() -> None:
    """On sm_75 the same kernel spills and finds no tensor cores: a check that passes there sees nothing."""
    (report,) = reports("sm_75", "forward:64:fp16:64x64w4")
    wrong = faults(report, BUDGET["sm_80"]["forward:64"])
    assert {"no mma"} < set(wrong)
    assert any("spills" in fault for fault in wrong)
    assert any("stack" in fault for fault in wrong)
    assert any("instructions, budget" in fault or "loops" in fault for fault in wrong)


def test_the_checks_catch_steps_that_are_too_large() -> None:
    (report,) = reports("sm_90", "dkv:128:bf16:64x64w4")
    assert any("spills" in fault for fault in faults(report, None))
