"""The allocator takes the setting where there is glibc, and says so where there is none."""

from __future__ import annotations

import platform
import subprocess
import sys


def test_setting_is_taken_by_glibc_alone() -> None:
    program = "from mmfuse.training.memory import keep_freed_memory; print(keep_freed_memory())"
    # In a process of its own, because the setting holds for the rest of a process.
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
