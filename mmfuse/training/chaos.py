"""`mmfuse chaos`: known faults, made on purpose in runs of a config, with what should happen and what did."""

from __future__ import annotations

import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from mmfuse.errors import ConfigError, RunError
from mmfuse.training.checkpoints import damage, last_path, read_checkpoint, resolve_checkpoint
from mmfuse.training.commands import StrictParser
from mmfuse.training.runs import default_folder
from mmfuse.training.trials import LOG, Trial, step_of
from mmfuse.training.verify_resume import verify_resume


class Outcome(NamedTuple):
    """What a fault did."""

    passed: bool
    happened: str


class Fault(NamedTuple):
    """One row of the table.

    Attributes:
        what: is done to a run.
        expected: what should happen.
        make: does it, in a folder of its own, with words of `mmfuse fit` and a number of steps.
    """

    what: str
    expected: str
    make: Callable[[list[str], Path, int], Outcome]


def main(argv: Sequence[str]) -> int:
    """Break runs of a config in known ways, and say of each whether it ended as it should."""
    parser = StrictParser("chaos", main.__doc__ or "")
    parser.add_argument("--config", action="append", required=True, help="as in fit; may be repeated")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (40)")
    parser.add_argument("--fault", action="append", default=None, help=f"only this one; of {', '.join(FAULTS)}")
    parser.add_argument("--out", default=None, help="folder for the runs (default: runs/CONFIG-chaos)")
    options, overrides = parser.parse_with_overrides(argv[1:])
    names = options.fault or list(FAULTS)
    if strangers := [name for name in names if name not in FAULTS]:
        raise ConfigError(f"--fault {strangers[0]}: unknown; known are {', '.join(FAULTS)}")
    if options.steps < 8:
        raise ConfigError(f"--steps must be at least 8, so that there is something to break, got {options.steps}")
    default = default_folder(options.config)
    out = Path(options.out) if options.out else default.with_name(f"{default.name}-chaos")
    if out.exists():
        raise ConfigError(f"--out {out}: the folder is there already; remove it or choose another one")
    words = [word for config in options.config for word in ("--config", config)] + overrides
    table = Table("fault", "should happen", "happened", "", title="chaos", title_justify="left")
    failed = []
    for name in names:
        fault = FAULTS[name]
        try:
            outcome = fault.make(words, out / name, options.steps)
        except RunError as error:
            outcome = Outcome(False, str(error))
        table.add_row(fault.what, fault.expected, outcome.happened, "pass" if outcome.passed else "FAIL")
        failed += [] if outcome.passed else [name]
    Console().print(table)
    if failed:
        raise RunError(f"chaos: {len(failed)} of {len(names)} faults did not end as they should: {', '.join(failed)}")
    return 0


def _short(words: list[str], steps: int, every: int) -> list[str]:
    return [*words, "--trainer.max_steps", str(steps), "--checkpoint_every", str(every)]


def _kill(words: list[str], out: Path, steps: int) -> Outcome:
    verdict = verify_resume(words, out, kills=2, steps=steps)
    return Outcome(verdict.difference is None, verdict.difference or f"{verdict.kills} kills, {steps} steps are equal")


def _terminate(words: list[str], out: Path, steps: int) -> Outcome:
    run = out / "run"
    trial = Trial(_short(words, steps, steps), run, out / LOG)
    if not trial.reach(lambda: step_of(run) >= 2):
        return Outcome(False, f"the run ended too early: {trial.last_words()}")
    trial.signal(signal.SIGTERM)
    code = trial.wait(600)
    if code != 143 or not last_path(run).exists():
        return Outcome(False, f"exit code {code}: {trial.last_words()}")
    wrong = damage(last_path(run))
    step = read_checkpoint(last_path(run), map_location="cpu")["global_step"] if wrong is None else None
    return Outcome(wrong is None, wrong or f"exit code 143, saved after step {step}")


def _kill_in_save(words: list[str], out: Path, steps: int) -> Outcome:
    run = out / "run"
    scratch = last_path(run).with_name(f".{last_path(run).name}.tmp")
    made = 0
    for _ in range(4):
        trial = Trial(_short(words, steps, 1), run, out / LOG)
        if not trial.reach(lambda: scratch.exists() and last_path(run).exists()):
            break
        trial.kill()
        made += 1
        if (wrong := damage(last_path(run))) is not None:
            return Outcome(False, f"last.ckpt is damaged after {made} kills: {wrong}")
    return Outcome(made > 0, f"{made} kills, the checkpoint is whole each time")


def _full_disk(words: list[str], out: Path, steps: int) -> Outcome:
    run = out / "run"
    half = steps // 2
    first = Trial(_short(words, half, half), run, out / LOG)
    if code := first.wait():
        return Outcome(False, f"the run ends with {code} by itself: {first.last_words()}")
    limit = last_path(run).stat().st_size // 2

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    second = Trial(_short(words, steps, 1), run, out / LOG, before=small_files)
    code = second.wait()
    wrong = damage(last_path(run))
    step = read_checkpoint(last_path(run), map_location="cpu")["global_step"] if wrong is None else None
    return Outcome(code == 1 and step == half, wrong or f"exit code {code}, last.ckpt of step {step} is whole")


def _flipped_bit(words: list[str], out: Path, steps: int) -> Outcome:
    run = out / "run"
    trial = Trial(_short(words, steps, max(1, steps // 4)), run, out / LOG)
    if code := trial.wait():
        return Outcome(False, f"the run ends with {code} by itself: {trial.last_words()}")
    path = last_path(run)
    flip_bit(path)
    try:
        resolve_checkpoint("last", run)
    except ConfigError as error:
        return Outcome("previous.ckpt is whole" in str(error), str(error))
    return Outcome(False, "the damaged checkpoint was accepted")


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of the largest record of a checkpoint (the padding between records means nothing)."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    with path.open("r+b") as file:
        file.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        at = record.header_offset + 30 + name + extra + record.file_size // 2
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


#: By name, in the order of the table.
FAULTS: Final[dict[str, Fault]] = {
    "kill": Fault("SIGKILL at random steps", "resumed: the same samples and losses", _kill),
    "terminate": Fault("SIGTERM", "the step is finished and saved, exit code 143", _terminate),
    "kill-in-save": Fault("SIGKILL while a checkpoint is written", "old or new, never torn", _kill_in_save),
    "full-disk": Fault("no room for a checkpoint", "a message, exit code 1, the old one is whole", _full_disk),
    "flipped-bit": Fault("a bit of last.ckpt flips", "refused, and previous.ckpt is named", _flipped_bit),
}
