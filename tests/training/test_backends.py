"""The attention backend is no part of the mathematics: a run gives the same losses under each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_losses_are_the_same_under_dense_masks_and_rectangles(
    mmfuse: Callable[..., Any],
    write_config: Callable[..., Path],
    tmp_path: Path,
    read_rows: Callable[[Path], list[dict[str, float]]],
) -> None:
    losses = {}
    for backend in ("sdpa", "rectangles"):
        path = write_config({"model": {"network": {"attention_backend": backend}}}, f"{backend}.yaml")
        assert mmfuse("fit", "--config", path, "--out", tmp_path / backend).code == 0
        losses[backend] = [row["train/loss"] for row in read_rows(tmp_path / backend) if "train/loss" in row]
    assert len(losses["sdpa"]) == 8 and len(set(losses["sdpa"])) == 8
    assert losses["rectangles"] == pytest.approx(losses["sdpa"], rel=0, abs=1e-4)
