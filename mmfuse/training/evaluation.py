"""`mmfuse eval` and `mmfuse compare-eval`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmfuse.errors import ConfigError
from mmfuse.training.commands import StrictParser, model_folder

#: The evaluation is done, but more samples than allowed could not be asked.
EXIT_PARTIAL = 4


def evaluate(argv: Sequence[str]) -> int:
    """Let a model answer tasks, score the answers and write a report."""
    parser = StrictParser("eval", "Let a model answer tasks, score the answers and write a report.")
    add = parser.add_argument
    add("--ckpt", required=True, help="a run folder, or a model saved by save_pretrained")
    add("--tasks", default="suite", help="tasks or groups, separated by commas (default: suite, which is embedded)")
    add("--out", required=True, help="folder of the evaluation; the same one again goes on where it was cut off")
    add("--limit", type=int, help="only the first items of each task")
    add("--batch_tokens", type=int, default=16384, help="tokens of a batch with padding (default: 16384)")
    add("--batch_size", type=int, help="items of a batch at most")
    add("--on_error", choices=("wrong", "skip", "abort"), default="wrong", help="samples with unusable media")
    add("--max_errors", type=float, default=0.01, help="share of such samples above which the exit code is 4")
    add("--fresh", action="store_true", help="forget answers that are in --out already")
    options = parser.parse(argv[1:])
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {options.limit}")
    if options.batch_tokens < 1 or (options.batch_size is not None and options.batch_size < 1):
        raise ConfigError("--batch_tokens and --batch_size must be at least 1")
    folder = model_folder(Path(options.ckpt))

    from mmfuse.eval.engine import NetworkEngine
    from mmfuse.eval.evalreport import write_evaluation
    from mmfuse.eval.progress import BarWatcher, LineWatcher
    from mmfuse.eval.ranks import Ranks
    from mmfuse.eval.runner import RunSettings, run_task
    from mmfuse.eval.scoring import judge, score_run
    from mmfuse.eval.tasks import find_tasks
    from mmfuse.training.inference import load_model

    tasks = [task.first(options.limit) for task in find_tasks(options.tasks.split(","))]
    ranks = Ranks.from_environment()
    engine = NetworkEngine(*load_model(folder))
    settings = RunSettings(options.batch_tokens, options.batch_size, options.on_error, options.fresh)
    out, console = Path(options.out), Console(stderr=True)
    watcher = BarWatcher(judge, console) if console.is_terminal and ranks.first else LineWatcher(judge)
    with watcher:
        runs = [run_task(engine, task, out, settings, ranks=ranks, watcher=watcher) for task in tasks]
    ranks.close()
    scores = [score_run(run, options.on_error) for run in runs]
    if ranks.first:
        write_evaluation(out, scores, engine.identity())
        print((out / "report.md").read_text(encoding="utf-8").split("\n## ")[0].strip())
        print(f"report: {out / 'report.html'}")
    errors, asked = sum(len(run.errors) for run in runs), sum(len(run.records) for run in runs)
    if errors > options.max_errors * asked:
        print(f"mmfuse: {errors} of {asked} samples could not be asked; the report names them", file=sys.stderr)
        return EXIT_PARTIAL
    return 0


def compare(argv: Sequence[str]) -> int:
    """Compare two evaluations of the same questions, pair by pair."""
    parser = StrictParser("compare-eval", "Compare two evaluations of the same questions, pair by pair.")
    parser.add_argument("first", help="the --out folder of one `mmfuse eval`")
    parser.add_argument("second", help="that of the other")
    options = parser.parse(argv[1:])

    from mmfuse.eval.paired import compare_folders
    from mmfuse.eval.statistics import holm

    found = compare_folders(Path(options.first), Path(options.second))
    adjusted = holm([own.comparison.p for own in found])
    table = Table(title=f"{options.second} against {options.first}", title_justify="left")
    for name in (
        "task",
        "metric",
        "first",
        "second",
        "difference",
        "95 % interval",
        "p (Holm)",
        "detectable",
        "n",
        "clusters",
    ):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for own, p in zip(found, adjusted, strict=True):
        compared = own.comparison
        table.add_row(
            own.task,
            own.metric,
            f"{own.first:.1%}",
            f"{own.second:.1%}",
            f"{100 * compared.difference:+.1f}",
            f"{100 * compared.interval.low:+.1f} … {100 * compared.interval.high:+.1f}",
            f"{p:.2g}",
            "–" if math.isnan(compared.detectable) else f"{100 * compared.detectable:.1f}",
            str(own.n),
            str(compared.interval.clusters),
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    return 0
