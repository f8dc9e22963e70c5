"""Where mmfuse keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$MMFUSE_CACHE`, else `mmfuse` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if "MMFUSE_CACHE" in os.environ:
        return Path(os.environ["MMFUSE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmfuse"
