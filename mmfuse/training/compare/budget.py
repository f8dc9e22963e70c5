"""How long each strategy trains: equally many steps, or equally many FLOPs or seconds as the first strategy.

What a step costs is measured for each stage of each strategy, and the steps of all its stages are scaled by one factor.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfuse.errors import ConfigError, RunError, unknown
from mmfuse.eval.results import write_text_atomically
from mmfuse.training.cli import parse_and_build
from mmfuse.training.compare.runs import run_command, tail
from mmfuse.training.compare.strategies import Strategy
from mmfuse.training.measure import training_flops
from mmfuse.training.metrics_csv import read_rows

KINDS = ("steps", "flops", "seconds")
FILE = "budget.json"

#: Steps of each stage in a timed run, of which the first are not counted: they fill caches and allocate memory.
TIMED_STEPS, UNTIMED_STEPS = 30, 5


def training_factors(kind: str, out: Path, strategies: Sequence[Strategy]) -> dict[str, float]:
    """For each strategy the factor on its steps that lets it use as much as the first with the config's own steps.

    Measurements are kept in `out/budget.json`: a timed run gives other numbers each time, and a comparison that is
    continued must not change.

    Args:
        kind: one of `KINDS`.
        out: the folder of the comparison.
        strategies: the strategies, the first of which is the measure.

    Raises:
        ConfigError: an unknown kind, another than `out` was begun with, or `trainer.max_steps` in the config.
        RunError: a timed run failed.
    """
    if kind not in KINDS:
        raise ConfigError(f"--budget: {unknown('budget', kind, KINDS)}")
    path = out / FILE
    held: dict[str, Any] = {"budget": kind, "cost_of_step": {}}
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
    if held["budget"] != kind:
        raise ConfigError(f"{out} was begun with --budget {held['budget']}, not {kind}; choose another --out")
    totals = {}
    for strategy in strategies:
        costs = [1.0] * len(strategy.settings["stages"])
        if kind != "steps":
            costs = _cost_of_step(kind, out, strategy, held["cost_of_step"])
        write_text_atomically(path, json.dumps(held, indent=2) + "\n")
        steps = (stage["steps"] for stage in strategy.settings["stages"])
        totals[strategy.label] = math.fsum(count * cost for count, cost in zip(steps, costs, strict=True))
    return {label: totals[strategies[0].label] / total for label, total in totals.items()}


def _cost_of_step(kind: str, out: Path, strategy: Strategy, held: dict[str, list[float]]) -> list[float]:
    """What a step of each stage costs, from `held` or measured and entered there."""
    if strategy.settings["trainer"]["max_steps"] not in (None, -1):
        raise ConfigError(f"--budget {kind} scales the stages, and trainer.max_steps would cut them off; leave it out")
    settings = {name: value for name, value in strategy.settings.items() if name != "out"}
    # A call with another config, which is refused later, must not replace what the runs here were planned by.
    key = f"{strategy.label} {hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"
    if key not in held:
        held[key] = sample_flops(strategy) if kind == "flops" else step_seconds(strategy, out / strategy.label)
    return held[key]


def sample_flops(strategy: Strategy) -> list[float]:
    """FLOPs of a training sample in each stage; batches are equally large, so steps cost in the same proportion."""
    cli = parse_and_build(strategy.words, run=False)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    return training_flops(cli.model, cli.datamodule)


def step_seconds(strategy: Strategy, folder: Path) -> list[float]:
    """Seconds of an optimizer step in each stage, from a short fit in a process of its own.

    The lower quartile of its steps: what else the machine does makes steps slower and never faster.

    Args:
        strategy: which one.
        folder: where the log of that fit stays.

    Raises:
        RunError: the fit failed.
    """
    run, log = folder / "timing", folder / "timing.log"
    stages = [
        {**stage, "steps": TIMED_STEPS, "warmup": min(stage["warmup"], TIMED_STEPS)}
        for stage in strategy.settings["stages"]
    ]
    unevaluated = ["--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "0"]
    words = [*strategy.words, "--stages", json.dumps(stages), *unevaluated, "--trainer.log_every_n_steps", "1"]
    shutil.rmtree(run, ignore_errors=True)
    code = run_command(["fit", *words, "--out", str(run)], log)
    if code:
        raise RunError(f"timing {strategy.label} failed (exit code {code}); {log} ends with: {tail(log)}")
    seconds = {int(row["step"]): float(row["train/seconds"]) for row in read_rows(run / "metrics.csv")}
    shutil.rmtree(run)
    starts = [number * TIMED_STEPS for number in range(len(stages))]
    counted = range(UNTIMED_STEPS + 1, TIMED_STEPS + 1)
    return [statistics.quantiles([seconds[start + step] for step in counted], n=4)[0] for start in starts]


def scaling_words(settings: Mapping[str, Any], factor: float) -> list[str]:
    """The flags of `fit` that multiply the steps of every stage by `factor`; none for the factor 1.

    Steps are rounded, to 1 at least; warm-up is scaled alike. So is an interval of validation that is given in steps:
    else the best checkpoint could be chosen long before the learning rate has come down.
    """
    if factor == 1:
        return []
    stages = []
    for stage in settings["stages"]:
        steps = max(1, round(stage["steps"] * factor))
        stages.append({**stage, "steps": steps, "warmup": min(steps, round(stage["warmup"] * factor))})
    words = ["--stages", json.dumps(stages)]
    interval = settings["trainer"]["val_check_interval"]
    if type(interval) is int:
        before, after = (sum(stage["steps"] for stage in part) for part in (settings["stages"], stages))
        words += ["--trainer.val_check_interval", str(max(1, interval * after // before))]
    return words
