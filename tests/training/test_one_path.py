"""The demo's pictures reach the model through the one decoder, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfuse.data.sources import undecoded
from mmfuse.training.streaming import read_sample_log

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]


def test_every_picture_of_a_run_is_decoded_by_the_table(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode_file = undecoded.decode_file

    def noted(data: bytes, ending: str, where: str, budget: Any) -> Any:
        decoded.append(where)
        return decode_file(data, ending, where, budget)

    monkeypatch.setattr(undecoded, "decode_file", noted)
    ran = mmfuse("fit", "--config", write_config(), "--out", tmp_path / "run", "--log_samples")
    assert ran.code == 0, ran.err
    log = read_sample_log(tmp_path / "run")
    used = [f"{name.partition('/')[2]}, image 0" for batches in log.values() for ids in batches for name in ids]
    assert len(used) == 8 * 8 and set(used) <= set(decoded)
    for part in ("val", "test"):
        assert len({where for where in decoded if where.startswith(f"{part}-")}) == 28


def test_budget_of_the_demo_is_one_of_its_settings(mmfuse: Command, write_config: WriteConfig, tmp_path: Path) -> None:
    words = ["--data.init_args.budget.pixels", "100", "--data.init_args.stream.bad_samples", '{"share": 0, "count": 0}']
    ran = mmfuse("fit", "--config", write_config(), "--out", tmp_path / "run", *words)
    assert ran.code == 1 and "pixels, more than the limit of 100" in ran.err
    assert "pixels, more than the limit" in (tmp_path / "run" / "quarantine.jsonl").read_text()
