"""The command: makes the faults of the table one by one, and prints what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from mmfuse.errors import ConfigError, RunError
from mmfuse.training.chaos import data, disk, processes
from mmfuse.training.chaos.bench import Bench, Outcome
from mmfuse.training.commands import StrictParser
from mmfuse.training.runs import default_folder


class Fault(NamedTuple):
    """One row of the table.

    Attributes:
        what: is done to a run.
        expected: what should happen.
        make: does it; the second argument names it, for the folders of its runs.
    """

    what: str
    expected: str
    make: Callable[[Bench, str], Outcome]


#: By name, in the order of the table.
FAULTS: Final[dict[str, Fault]] = {
    "kill": Fault("SIGKILL at random steps", "resumed: the same samples and losses", processes.kill),
    "kill-ranks": Fault("SIGKILL to both of two ranks", "resumed: the same samples and losses", processes.kill_ranks),
    "other-workers": Fault("resumed with 2, then 4 workers", "the same samples and losses", processes.other_workers),
    "other-ranks": Fault("resumed on 2 ranks, then on 1", "the same samples in every step", processes.other_ranks),
    "worker-kill": Fault("SIGKILL to a data worker", "a message, exit code 1; resumed: equal", processes.kill_worker),
    "rank-kill": Fault("SIGKILL to one of two ranks", "the other ends, too; checkpoint whole", processes.kill_rank),
    "terminate": Fault("SIGTERM", "the step is finished and saved, exit code 143", processes.terminate),
    "terminate-rank": Fault("SIGTERM to rank 1 of 2", "both finish the step, exit code 143", processes.terminate_rank),
    "flaky-reads": Fault("a share of reads fails once (EIO)", "tried again: the same samples", data.flaky_reads),
    "dead-disk": Fault("all reads fail from some point on", "a message, exit code 1, no skipping", data.dead_disk),
    "stalled-reads": Fault("reads hang", "after stream.timeout a message with the sample", data.stalled_reads),
    "bad-samples": Fault("damaged and missing images", "left out, each named in quarantine.jsonl", data.bad_samples),
    "bad-limit": Fault("more bad samples than the limit", "a message with the counts, exit code 1", data.too_many_bad),
    "truncated-shard": Fault("a shard is cut off", "refused: its name and the byte", data.truncated_shard),
    "changed-shard": Fault("a shard is replaced between runs", "refused: the name of the source", data.changed_shard),
    "same-names": Fault("remote shards of one name", "each source has its own samples", data.same_names),
    "not-a-number": Fault("weights become NaN", "stops before a checkpoint, names samples", data.not_a_number),
    "payloads": Fault("pickles, bombs, commands in data", "refused, and no code has run", data.payloads),
    "kill-in-save": Fault("SIGKILL while a checkpoint is written", "old or new, never torn", disk.kill_in_save),
    "full-disk": Fault("no room for a checkpoint", "a message, exit code 1, the old one is whole", disk.full_disk),
    "flipped-bit": Fault("a bit of last.ckpt flips", "refused, and previous.ckpt is named", disk.flipped_bit),
}


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
    bench = Bench(words, out, options.steps)
    table = Table("fault", "should happen", "happened", "", title="chaos", title_justify="left")
    failed = []
    for name in names:
        fault = FAULTS[name]
        try:
            outcome = fault.make(bench, name)
        except RunError as error:
            outcome = Outcome(False, str(error))
        table.add_row(fault.what, fault.expected, outcome.happened, "pass" if outcome.passed else "FAIL")
        failed += [] if outcome.passed else [name]
    Console().print(table)
    if failed:
        raise RunError(f"chaos: {len(failed)} of {len(names)} faults did not end as they should: {', '.join(failed)}")
    return 0
