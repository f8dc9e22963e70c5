"""`mmfuse data pack | lint | stats | peek`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmfuse.data import Sample, open_source
from mmfuse.errors import ConfigError, unknown
from mmfuse.models.chat import content_text
from mmfuse.models.media import MEDIA
from mmfuse.training.commands import StrictParser

EXIT_FAULTS = 1


def main(argv: Sequence[str]) -> int:
    """Run one of the commands; `argv` begins with `data`."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {"pack": pack, "lint": lint, "stats": stats, "peek": peek}
    if len(argv) < 2 or argv[1] in ("-h", "--help"):
        print("usage: mmfuse data pack | lint | stats | peek PATH [OPTIONS]")
        for name, command in commands.items():
            print(f"  {name:<6} {(command.__doc__ or '').splitlines()[0]}")
        return 0 if len(argv) > 1 else 2
    if argv[1] not in commands:
        raise ConfigError(unknown("command of `mmfuse data`", argv[1], commands))
    return commands[argv[1]](argv[2:])


def _parser(name: str, description: str | None) -> StrictParser:
    parser = StrictParser(f"data {name}", (description or "").splitlines()[0])
    parser.add_argument("path", help="shards, JSON, JSONL or parquet, or a folder, see docs/data.md")
    parser.add_argument("--images", help="folder that names of images in a JSON file start from")
    return parser


def pack(words: Sequence[str]) -> int:
    """Write any data as webdataset shards."""
    parser = _parser("pack", pack.__doc__)
    parser.add_argument("--out", required=True, help="folder for the shards; the same call continues")
    parser.add_argument("--per_shard", type=int, default=1000, help="samples of a shard (default: 1000)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that write (default: all cores)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out what cannot be read, and name it")
    options = parser.parse(words)
    for name in ("per_shard", "processes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(options, name)}")
    from mmfuse.data.tools.pack import Packed, pack_source

    source = open_source(options.path, images=options.images)
    console = Console(stderr=True)
    columns = [TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=-(-len(source) // options.per_shard))

        def report(packed: Packed) -> None:
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{packed.name}: {packed.samples} samples", highlight=False)

        settings = {"per_shard": options.per_shard, "processes": options.processes, "skip_bad": options.skip_bad}
        packed = pack_source(source, Path(options.out), report=report, **settings)
    skipped = [one for each in packed for one in each.skipped]
    for key, reason in skipped[:20]:
        console.print(f"skipped {key}: {reason}", highlight=False, markup=False)
    samples, size = sum(one.samples for one in packed), sum(one.size for one in packed)
    print(f"{samples} samples in {sum(bool(one.size) for one in packed)} shards, {size / 2**20:.1f} MiB: {options.out}")
    if skipped:
        print(f"{len(skipped)} samples were skipped; the .skipped.json files beside the shards name them")
    return 0


def lint(words: Sequence[str]) -> int:
    """Look for faults: missing files, wrong placeholders, empty answers, duplicates, too long samples."""
    parser = _parser("lint", lint.__doc__)
    _add_measure(parser)
    parser.add_argument("--max_tokens", type=int, help="longest sample that is no fault")
    parser.add_argument("--decode", action="store_true", help="decode all media, too")
    options = parser.parse(words)
    from mmfuse.data.tools.lint import KINDS
    from mmfuse.data.tools.lint import lint as find
    from mmfuse.data.tools.stats import text_histogram

    measure, unit = _measure(options)
    found = find(options.path, options.images, measure, max_length=options.max_tokens, decode=options.decode)
    table = Table(title=f"{found.samples} samples", title_justify="left", box=None, pad_edge=False)
    for name in ("fault", "samples", "first"):
        table.add_column(name, justify="right" if name == "samples" else "left", overflow="fold")
    for kind in KINDS:
        if kind in found.faults:
            fault = found.faults[kind]
            detail = fault.detail.removeprefix(fault.where).lstrip(": ")
            table.add_row(kind, str(fault.times), f"{fault.where}: {detail}")
    console = Console()
    console.print(table if found.faults else f"{found.samples} samples, no faults", highlight=False, markup=False)
    console.print(f"\nlengths ({unit})", highlight=False)
    for line in text_histogram(found.lengths):
        console.print(line, highlight=False)
    return EXIT_FAULTS if found.faults else 0


def stats(words: Sequence[str]) -> int:
    """Count modalities, lengths and sizes, in a table and as a picture."""
    parser = _parser("stats", stats.__doc__)
    _add_measure(parser)
    parser.add_argument("--samples", type=int, help="only so many, evenly spread")
    parser.add_argument("--out", default="data-stats.png", help="the picture (default: data-stats.png)")
    options = parser.parse(words)
    from mmfuse.data.tools.stats import plot, statistics

    source = open_source(options.path, images=options.images)
    measure, unit = _measure(options)
    found = statistics(source, measure, unit, options.samples)
    table = Table(title=f"{source.name}: {len(source)} samples", title_justify="left", box=None, pad_edge=False)
    summary = found.summary()
    table.add_column("")
    for name in next(iter(summary.values())):
        table.add_column(name, justify="right")
    for name, row in summary.items():
        table.add_row(name, *(f"{value:,.0f}" if value == int(value) else f"{value:,.1f}" for value in row.values()))
    console = Console()
    console.print(table)
    for name, count in found.modalities.most_common():
        console.print(f"{count:>8} {name}", highlight=False)
    plot(found, source.name, Path(options.out))
    console.print(f"picture: {options.out}", highlight=False)
    return 0


def peek(words: Sequence[str]) -> int:
    """Show some samples as they are read."""
    parser = _parser("peek", peek.__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first sample (default: 0)")
    parser.add_argument("--count", type=int, default=3, help="how many (default: 3)")
    options = parser.parse(words)
    source = open_source(options.path, images=options.images)
    if not 0 <= options.first < len(source):
        raise ConfigError(f"--first {options.first}: {source.name} has the samples 0 to {len(source) - 1}")
    for number in range(options.first, min(options.first + options.count, len(source))):
        print(_shown(source[number], number))
    return 0


def _shown(sample: Sample, number: int) -> str:
    lines = [f"[{number}] {sample.key}"]
    for image in sample.images:
        size = getattr(image, "size", None)
        what = f"{size[0]} x {size[1]}, {image.mode}" if size else f"features {image.values.shape}"
        lines.append(f"  image: {what}")
    lines += [f"  {name}: features {item.values.shape}" for name in ("audio", "eeg") for item in sample.media[name]]
    if sample.messages is None:
        lines.append(f"  text: {sample.text}")
    lines += [f"  {message['role']}: {content_text(message['content'])}" for message in sample.messages or ()]
    lines += [f"  ({name}: {value!r:.80})" for name, value in sample.info.items()]
    return "\n".join(lines)


def _add_measure(parser: StrictParser) -> None:
    parser.add_argument("--tokenizer", help="folder or hub name; without it lengths are in characters")
    parser.add_argument("--image_tokens", type=int, default=256, help="tokens of an image (default: 256)")


def _measure(options: Any) -> tuple[Callable[[Sample], int], str]:
    """Length of a sample in tokens, media included, or in characters without a tokenizer."""
    if options.tokenizer is None:
        return _characters, "characters"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    special = [medium.placeholder for medium in MEDIA.values()]
    tokenizer.add_special_tokens({"additional_special_tokens": special})

    def tokens(sample: Sample) -> int:
        texts = [sample.text or "", *(content_text(message["content"]) for message in sample.messages or ())]
        marks = sum(text.count(placeholder) for text in texts for placeholder in special)
        plain = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        return plain + marks * (options.image_tokens - 1)

    return tokens, "tokens"


def _characters(sample: Sample) -> int:
    return len(sample.text or "") + sum(len(content_text(message["content"])) for message in sample.messages or ())
