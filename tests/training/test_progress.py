"""What people see while a run goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmfuse.training.callbacks import PlainProgress, StepMetrics, TerminalProgress, progress_callback, summary_table
from mmfuse.training.cli import parse_and_build

WriteConfig = Callable[..., Path]


def test_throughput_is_tokens_over_seconds_by_modality() -> None:
    metrics = StepMetrics()
    metrics._recent = deque([(0.5, {"text": 100, "image": 40, "eeg": 0}), (1.5, {"text": 300, "image": 40, "eeg": 0})])
    assert metrics.throughput() == {"text": 200.0, "image": 40.0}
    assert StepMetrics().throughput() == {}
    assert StepMetrics().tokens_per_second == 0.0


def test_lines_where_there_is_no_terminal(mmfuse: Any, write_config: WriteConfig, tmp_path: Path) -> None:
    ran = mmfuse("fit", "--config", write_config(), "--out", tmp_path / "run")
    assert ran.code == 0
    last = [line for line in ran.err.splitlines() if line.startswith("step ")][-1]
    assert last.startswith("step 8/8: stage instruct, loss ")
    assert "tok/s text " in last
    assert " image " in last
    assert "\x1b" not in ran.err
    assert "report.html" in ran.out


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert isinstance(progress_callback(), TerminalProgress)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert isinstance(progress_callback(), PlainProgress)


def test_the_bar_says_stage_and_speed(write_config: WriteConfig, tmp_path: Path, monkeypatch: Any) -> None:
    screen = StringIO()
    terminal = Console(file=screen, force_terminal=True, width=110)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: terminal)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None)
    monkeypatch.setattr("mmfuse.training.cli.progress_callback", TerminalProgress)
    parse_and_build(["fit", "--config", str(write_config()), "--out", str(tmp_path / "run")])
    shown = screen.getvalue()
    for part in ("Training", "stage: instruct", "tok/s: text", "image", "val:", "Held-out questions", "8/8"):
        assert part in shown


def test_summary_says_what_is_frozen(write_config: WriteConfig, tmp_path: Path) -> None:
    module = parse_and_build(["--config", str(write_config()), "--out", str(tmp_path / "run")], run=False).model
    screen = StringIO()
    Console(file=screen, width=120).print(summary_table(module))
    rows = {line.split("│")[1].strip(): line for line in screen.getvalue().splitlines() if line.count("│") > 3}
    assert "frozen" in rows["encoder"]
    assert "lr 0.01" in rows["encoder"]
    assert "frozen" not in rows["connector"]
    total = sum(parameter.numel() for parameter in module.network.decoder.parameters())
    assert f"{total:,}" in rows["decoder"]
