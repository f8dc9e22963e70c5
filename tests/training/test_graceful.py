"""A signal ends a run behind an optimizer step, with its state saved and exit code 143, whichever rank gets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from mmfuse.data.workers import shield_worker
from mmfuse.training.checkpoints import damage, read_checkpoint
from mmfuse.training.graceful import SIGNALS
from mmfuse.training.module import MultimodalModule
from mmfuse.training.streaming import read_sample_log

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]
ReadRows = Callable[[Path], list[dict[str, float]]]


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    original = MultimodalModule.training_step

    def signalled(self: MultimodalModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MultimodalModule, "training_step", signalled)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_saves_the_step_and_the_run_goes_on(
    number: signal.Signals,
    mmfuse: Command,
    write_config: WriteConfig,
    tmp_path: Path,
    read_rows: ReadRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    words = ["fit", "--config", write_config({"checkpoint_every": 100}), "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        signal_at(patch, 4, number)
        ran = mmfuse(*words)
    assert ran.code == 143
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"mmfuse: stopped by {number.name} after step 5; saved in {last}." in ran.err
    assert damage(last) is None and read_checkpoint(last)["global_step"] == 5
    assert not (tmp_path / "run" / "results.json").exists()
    assert [signal.getsignal(one) for one in SIGNALS] == before, "handlers are what they were"
    assert mmfuse(*words, "--ckpt_path", "last").code == 0
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(1, 9))


class Handlers(Callback):
    """Notes who answers SIGTERM in training."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        type(self).seen = [signal.getsignal(one) for one in SIGNALS]

    seen: list[Any]


def test_lightning_installs_no_handler_of_its_own(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MultimodalModule, "configure_callbacks", lambda self: [Handlers()])
    assert mmfuse("fit", "--config", write_config(), "--out", tmp_path / "run").code == 0
    assert [handler.__qualname__ for handler in Handlers.seen] == ["GracefulStop._note"] * 2


class Numbers:
    """0, 1, 2, ..."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return index


def test_worker_outlives_the_signals_of_others_and_obeys_its_trainer() -> None:
    loader: DataLoader[Any] = DataLoader(
        Numbers(),  # type: ignore[arg-type]
        batch_size=1,
        num_workers=1,
        worker_init_fn=shield_worker,
        multiprocessing_context="fork",
        prefetch_factor=1,
    )
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    for number in SIGNALS:
        subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    for _ in range(20):
        next(batches)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert not worker.is_alive()


DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def started(config: Path, run: Path, steps: int) -> subprocess.Popen[str]:
    """Two ranks over gloo, which have made `steps` steps."""
    words = ["fit", "--config", str(config), "--out", str(run), "--log_samples", *DDP]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfuse", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 200
    while not (run / "metrics.csv").exists() or (run / "metrics.csv").read_text().count("\n") <= steps:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it was signalled"
        time.sleep(0.02)
    return process


def children(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in out.stdout.splitlines() if "mmfuse" in line]


def ended(pid: int) -> bool:
    """Whether the process is gone within a minute, or a zombie that nobody waits for."""
    for _ in range(600):
        state = subprocess.run(
            ["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_dies_ends_the_job_with_a_message(
    rank: int, write_config: WriteConfig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Also the one that has launched the other, which then belongs to nobody."""
    stages = [{**settings["stages"][1], "steps": 3000}]
    config = write_config({"stages": stages, "checkpoint_every": 2, "trainer": {"val_check_interval": 3000}})
    process = started(config, tmp_path / "run", 5)
    (child,) = children(process.pid)
    os.kill((process.pid, child)[rank], signal.SIGKILL)
    error = process.communicate(timeout=60)[1]  # of both: they share it
    assert process.returncode != 0 and ended(child)
    assert "onnection" in error or "peer" in error, error
    assert damage(tmp_path / "run" / "checkpoints" / "last.ckpt") is None


#: To which ranks a signal goes, behind which step, and how many seconds later. Validation takes most of a run here.
TRIALS = [(ranks, step, pause) for ranks in ((0,), (1,), (0, 1)) for step, pause in ((1, 0.0), (6, 0.03), (12, 0.4))]


def stop(config: Path, run: Path, ranks: Sequence[int], step: int, pause: float) -> int:
    """SIGTERM to some of two ranks; both have ended behind the same step, which is saved and returned."""
    process = started(config, run, step)
    (child,) = children(process.pid)
    time.sleep(pause)
    for rank in ranks:
        os.kill((process.pid, child)[rank], signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error
    assert ended(child), "rank 1 is left behind"
    last = run / "checkpoints" / "last.ckpt"
    assert damage(last) is None
    saved = read_checkpoint(last)
    stopped = int(saved["global_step"])
    assert f"after step {stopped};" in error and saved["HandwritingData"]["steps"] == stopped >= step
    log = read_sample_log(run)
    assert list(log) == list(range(1, stopped + 1)), "no rank has made another step"
    assert all(len(batches) == 2 for batches in log.values()), "of both ranks"
    return stopped


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "step", "pause"), [TRIALS[0], TRIALS[4], TRIALS[8]])
def test_two_ranks_stop_at_the_same_step(
    ranks: Sequence[int], step: int, pause: float, write_config: WriteConfig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    stages = [{**settings["stages"][1], "steps": 3000}]
    config = write_config({"stages": stages, "checkpoint_every": 5000, "trainer": {"val_check_interval": 4}})
    stop(config, tmp_path / "run", ranks, step, pause)
