"""`mmfuse verify-resume`: a run that is killed again and again must be the run that was never killed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mmfuse.errors import ConfigError, RunError
from mmfuse.training.commands import StrictParser
from mmfuse.training.runs import default_folder
from mmfuse.training.streaming import read_sample_log
from mmfuse.training.trials import LOG, Trial, losses, step_of


class Verdict(NamedTuple):
    """What the comparison found.

    Attributes:
        kills: how many times the run was killed.
        steps: compared.
        difference: the first one; None if there is none.
    """

    kills: int
    steps: int
    difference: str | None


def main(argv: Sequence[str]) -> int:
    """Kill a run of a config at random points, resume it each time, and compare it with a run that was left alone."""
    parser = StrictParser("verify-resume", main.__doc__ or "")
    parser.add_argument("--config", action="append", required=True, help="as in fit; may be repeated")
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed (20)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the run (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the points at which it is killed (0)")
    parser.add_argument("--out", default=None, help="folder for both runs (default: runs/CONFIG-verify-resume)")
    options, overrides = parser.parse_with_overrides(argv[1:])
    if not 0 < options.kills < options.steps:
        raise ConfigError(f"--kills must lie in 1..{options.steps - 1} (below --steps), got {options.kills}")
    default = default_folder(options.config)
    out = Path(options.out) if options.out else default.with_name(f"{default.name}-verify-resume")
    if out.exists():
        raise ConfigError(f"--out {out}: the folder is there already; remove it or choose another one")
    words = [word for config in options.config for word in ("--config", config)] + overrides
    verdict = verify_resume(words, out, kills=options.kills, steps=options.steps, seed=options.seed)
    if verdict.difference is not None:
        raise RunError(f"verify-resume FAILED after {verdict.kills} kills: {verdict.difference}; both runs: {out}")
    print(f"verify-resume PASSED: {verdict.kills} kills, {verdict.steps} steps: the same samples, the same losses")
    return 0


def verify_resume(words: Sequence[str], out: Path, *, kills: int, steps: int, seed: int = 0) -> Verdict:
    """Make both runs and compare them.

    Args:
        words: of `mmfuse fit`, without `fit` and `--out`.
        out: gets the folders `whole` and `killed`.
        kills: how often the second run is killed.
        steps: of both.
        seed: of the points at which it is killed.

    Raises:
        RunError: a run fails by itself.
    """
    every = max(1, steps // (2 * kills))
    words = [*words, "--trainer.max_steps", str(steps), "--checkpoint_every", str(every), "--log_samples"]
    whole = Trial(words, out / "whole", out / f"whole-{LOG}")
    if code := whole.wait():
        raise RunError(f"the run that is left alone ends with {code}: {whole.last_words()}")
    rng = random.Random(seed)
    made = 0
    # Moments between the ends of steps, too: in the middle of a step, of a save, of a start.
    for point in sorted(rng.sample(range(1, steps), kills)):
        trial = Trial(words, out / "killed", out / f"killed-{LOG}")
        if not trial.reach(partial(_stands_at, out / "killed", point)):
            if code := trial.wait():
                raise RunError(f"the run ends with {code} by itself after {made} kills: {trial.last_words()}")
            break
        time.sleep(rng.random() * 0.1)
        trial.kill()
        made += 1
    last = Trial(words, out / "killed", out / f"killed-{LOG}")
    if code := last.wait():
        raise RunError(f"the run ends with {code} by itself after {made} kills: {last.last_words()}")
    return Verdict(made, steps, first_difference(out / "whole", out / "killed"))


def _stands_at(run: Path, step: int) -> bool:
    return step_of(run) >= step


def first_difference(whole: Path, killed: Path) -> str | None:
    """The first step whose samples or loss differ, in words."""
    samples = [read_sample_log(run) for run in (whole, killed)]
    for step in sorted(samples[0].keys() | samples[1].keys()):
        one, other = (log.get(step) for log in samples)
        if one != other:
            return f"step {step} was trained on {_some(other)} instead of {_some(one)}"
    losses_ = [losses(run) for run in (whole, killed)]
    for step in sorted(losses_[0].keys() | losses_[1].keys()):
        if losses_[0].get(step) != losses_[1].get(step):
            return f"the loss of step {step} is {losses_[1].get(step)} instead of {losses_[0].get(step)}"
    return None


def _some(batches: Sequence[Sequence[str]] | None) -> str:
    names = [name for batch in batches or () for name in batch]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "") if names else "nothing"
