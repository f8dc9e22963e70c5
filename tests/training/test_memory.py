"""The allocator's setting takes effect."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from mmfuse.training.memory import keep_freed_memory
if {tuned}:
    assert keep_freed_memory()
def step():
    return sum(float(x[0]) for x in [torch.ones(1 << 19) for _ in range(16)])

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(tuned: bool) -> int:
    words = [sys.executable, "-c", PROGRAM.format(tuned=tuned)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    assert faults(tuned=True) < 0.5 * faults(tuned=False)
