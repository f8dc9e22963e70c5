"""Faults of processes: killed, terminated, and gone on with by others."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from mmfuse.training.chaos.bench import PATIENCE, Bench, Outcome, said, saved_step
from mmfuse.training.streaming import read_sample_log
from mmfuse.training.trials import Trial, step_of
from mmfuse.training.verify_resume import verify_resume

WORKERS = "--data.init_args.num_workers"
ACCUMULATE = "--trainer.accumulate_grad_batches"
RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def kill(bench: Bench, name: str) -> Outcome:
    """The whole process group, as when a machine fails."""
    return _verified(bench, name)


def kill_ranks(bench: Bench, name: str) -> Outcome:
    """As `kill`, on two ranks."""
    return _verified(bench, name, *RANKS)


def _verified(bench: Bench, name: str, *more: str) -> Outcome:
    verdict = verify_resume([*bench.words, *more], bench.out / name, kills=2, steps=bench.steps)
    happened = verdict.difference or f"{verdict.kills} kills, {verdict.steps} steps are equal"
    return Outcome(verdict.difference is None and verdict.kills > 0, happened)


def other_workers(bench: Bench, name: str) -> Outcome:
    """From no worker to two and four."""
    third = bench.steps // 3
    for workers, steps in ((0, third), (2, 2 * third), (4, bench.steps)):
        run = bench.finish(name, WORKERS, str(workers), steps=steps, every=1)
    return bench.same(run, "0, 2 and 4 workers")


def other_ranks(bench: Bench, name: str) -> Outcome:
    """From one rank to two and back, with as many batches in a step; sums of gradients round in another order."""
    third = bench.steps // 3
    bench.finish(name, ACCUMULATE, "2", steps=third, every=1)
    bench.finish(name, ACCUMULATE, "1", *RANKS, steps=2 * third, every=1)
    run = bench.finish(name, ACCUMULATE, "2", every=1)
    one, other = read_sample_log(bench.whole(ACCUMULATE, "2")), read_sample_log(run)
    wrong = [step for step in one if one[step] != other.get(step)]
    return Outcome(not wrong, f"step {wrong[0]} has other samples" if wrong else f"{len(one)} steps have equal samples")


def kill_worker(bench: Bench, name: str) -> Outcome:
    """One of two, in the middle of the run, which is then resumed."""
    trial = bench.start(name, WORKERS, "2", every=1)
    if not _reached(trial):
        return _too_early(trial)
    os.kill(children(trial.pid)[0], signal.SIGKILL)
    code = trial.wait(PATIENCE)
    words = said(trial)
    if code != 1 or "the data workers" not in words:
        return Outcome(False, f"exit code {code}: {words}")
    return bench.same(bench.finish(name, WORKERS, "2"), f"exit code 1: {words}")


def kill_rank(bench: Bench, name: str) -> Outcome:
    """Rank 1 of two."""
    trial = bench.start(name, *RANKS, every=1)
    if not _reached(trial):
        return _too_early(trial)
    os.kill(children(trial.pid)[0], signal.SIGKILL)
    begun = time.monotonic()
    code = trial.wait(PATIENCE)
    seconds = time.monotonic() - begun
    step, wrong = saved_step(trial.run)
    happened = wrong or f"rank 0 ends with {code} after {seconds:.1f} s, last.ckpt of step {step} is whole"
    return Outcome(code != 0 and wrong is None and seconds < 60, happened)


def terminate(bench: Bench, name: str) -> Outcome:
    """The only process."""
    trial = bench.start(name, every=bench.steps)
    return _terminated(trial, trial.pid) if _reached(trial) else _too_early(trial)


def terminate_rank(bench: Bench, name: str) -> Outcome:
    """Rank 1, which has to tell rank 0."""
    trial = bench.start(name, *RANKS, every=bench.steps)
    return _terminated(trial, children(trial.pid)[0]) if _reached(trial) else _too_early(trial)


def _terminated(trial: Trial, pid: int) -> Outcome:
    os.kill(pid, signal.SIGTERM)
    code = trial.wait(600)
    if code != 143:
        return Outcome(False, f"exit code {code}: {trial.last_words()}")
    step, wrong = saved_step(trial.run)
    return Outcome(wrong is None and step == step_of(trial.run), wrong or f"exit code 143, saved after step {step}")


def _reached(trial: Trial) -> bool:
    return trial.reach(lambda: step_of(trial.run) >= 2)


def _too_early(trial: Trial) -> Outcome:
    return Outcome(False, f"the run ended before the fault could be made: {trial.last_words()}")


def children(pid: int) -> list[int]:
    """Worker processes and ranks that a run has started: processes with its own command line.

    They are in the order in which they were started, on Linux.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_own = parent == pid and b"\0fit\0" in (folder / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):  # ended at this moment
            continue
        found += [int(folder.name)] if is_own else []
    return sorted(found)
