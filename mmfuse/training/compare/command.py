"""`mmfuse compare`: reads the words, trains what is missing, and shows one table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from mmfuse.errors import ConfigError, RunError
from mmfuse.training.cli import resolved_settings
from mmfuse.training.commands import StrictParser
from mmfuse.training.compare.budget import scaling_words, training_factors
from mmfuse.training.compare.display import watching
from mmfuse.training.compare.report import JSON, MARKDOWN, notes, terminal_table, write_comparison
from mmfuse.training.compare.runs import Run, train
from mmfuse.training.compare.strategies import Strategy, resolve_strategies
from mmfuse.training.compare.summary import Row, summarise
from mmfuse.training.measure import measure_run
from mmfuse.training.runs import default_folder

#: Where the output is no terminal, a table that is wrapped at 80 columns is hard to read.
FILE_WIDTH = 130


def main(argv: Sequence[str]) -> int:
    """Run the command; `argv` begins with its name."""
    options = parse(argv[1:])
    default = default_folder(options.config[:1])
    out = Path(options.out) if options.out else default.with_name(f"{default.name}-compare")
    strategies = resolve_strategies(options.fusion, options.config, options.set)
    progress = Console(stderr=True)
    if options.budget != "steps":
        progress.print(f"measuring the {options.budget} of a step of each strategy")
    factors = training_factors(options.budget, out, strategies)
    runs = plan_runs(out, strategies, factors, options.seeds)
    for run in runs:
        run.check_config()
    with watching(progress, runs) as watcher:
        failures = train(runs, watcher)
    progress.print("measuring the models: FLOPs, latencies, caches")
    rows = summarise(runs, factors, measure_run)
    about = {"config": options.config, "set": options.set, "budget": options.budget, "seeds": options.seeds}
    write_comparison(out, rows, about)
    show(out, rows)
    if failures:
        names = "; ".join(f"{failure.run.name} ({failure.reason}, see {failure.run.log})" for failure in failures)
        raise RunError(f"{len(failures)} of {len(runs)} runs failed: {names}. The same command tries them again")
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of the command.

    Raises:
        ConfigError: a flag that does not exist, a value that makes no sense, or something missing.
    """
    parser = StrictParser("compare", "Train one config under several fusion strategies and seeds, all else equal.")
    add = parser.add_argument
    add("--config", action="append", required=True, help="a config; repeat to overlay")
    add("--fusion", required=True, help="strategies, separated by commas: names, or YAML files over the config")
    add("--seeds", type=int, default=1, help="runs of each strategy, with the seeds 0, 1, … (default: 1)")
    add("--budget", default="steps", help="what strategies get equally much of: steps, flops or seconds of training")
    add("--out", help="folder of all runs and of the table (default: runs/CONFIG-compare)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config; may be repeated")
    options = parser.parse(words)
    if options.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {options.seeds}")
    return options


def plan_runs(out: Path, strategies: Sequence[Strategy], factors: Mapping[str, float], seeds: int) -> list[Run]:
    """All runs, seed by seed, so that a comparison that is cut off has as many of each strategy as possible.

    Args:
        out: the folder of the comparison.
        strategies: in the order of the table.
        factors: on the steps of each.
        seeds: 0, 1, … up to so many.
    """
    runs = []
    for seed in range(seeds):
        for strategy in strategies:
            folder = out / strategy.label / f"seed-{seed}"
            scaled = scaling_words(strategy.settings, factors[strategy.label])
            words = (*strategy.words, *scaled, "--seed_everything", str(seed), "--out", str(folder))
            runs.append(Run(strategy.label, seed, folder, words, resolved_settings(words)))
    return runs


def show(out: Path, rows: Sequence[Row]) -> None:
    """Print the table and where the files are."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    console.print(terminal_table(rows))
    for note in notes(rows):
        console.print(note, highlight=False)
    console.print(f"table, pictures, numbers: {out / MARKDOWN}, {out / JSON}", highlight=False, soft_wrap=True)
