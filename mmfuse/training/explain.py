"""`mmfuse explain`: what a config makes of its first batch, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfuse.data import BatchStream, StreamLoader
from mmfuse.errors import ConfigError
from mmfuse.fusion import IGNORED_LABEL, Fusion
from mmfuse.models import MultimodalProcessor
from mmfuse.sequence import Modality, Role, TokenMap
from mmfuse.training.cli import parse_and_build
from mmfuse.training.commands import StrictParser
from mmfuse.training.data import MultimodalData
from mmfuse.training.module import MultimodalModule
from mmfuse.training.runs import default_folder

#: Longer sequences do not fit into a terminal; their mask is in the picture only.
WIDEST_ASCII = 96


def main(argv: Sequence[str]) -> int:
    """Run the command; `argv` begins with its name."""
    parser = StrictParser("explain", "Show the first batch of each stage: tokens by modality, labels, and the mask.")
    parser.add_argument("--config", action="append", required=True, help="a config; repeat to overlay")
    parser.add_argument("--out", help="folder for the pictures (default: runs/CONFIG-explain)")
    parser.add_argument("--sample", type=int, default=0, help="which sample of the batch is drawn (default: 0)")
    options, overrides = parser.parse_known_args(list(argv[1:]))
    folder = Path(options.out) if options.out else default_folder(options.config[:1]).with_suffix(".explain")
    words = [word for config in options.config for word in ("--config", config)]
    cli = parse_and_build([*words, *overrides, "--out", str(folder)], run=False)
    module, data = cli.model, cli.datamodule
    data.prepare_data()
    data.setup("fit")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    for number, stage in enumerate(module.schedule.stages):
        batch = first_batch(module, data, number)
        if not 0 <= options.sample < batch["input_ids"].shape[0]:
            raise ConfigError(f"--sample {options.sample}: the batch has samples 0..{batch['input_ids'].shape[0] - 1}")
        fusion = module.stage_fusions[number] or module.network.fusion
        title = f"stage {stage.name!r}: {stage.steps} steps under {type(fusion).__name__}"
        console.rule(title, align="left")
        console.print(batch_table(batch))
        console.print(sample_text(batch, module.processor, options.sample))
        picture = folder / f"{number + 1}-{stage.name}-mask.png"
        show_mask(console, batch["tokens"], fusion, options.sample, picture)
    return 0


def first_batch(module: MultimodalModule, data: MultimodalData, stage: int) -> dict[str, Any]:
    """The first training batch of a stage, with the map of its tokens."""
    with torch.no_grad():
        return module.network.prepared(collated_batch(module, data, stage))


def collated_batch(module: MultimodalModule, data: MultimodalData, stage: int) -> dict[str, Any]:
    """The first training batch of a stage, as the loader gives it."""
    plan = data.plan()
    stream = BatchStream(plan, data.encoding(module.processor), start=plan.starts[stage])
    return next(iter(StreamLoader(stream)))


def batch_table(batch: dict[str, Any]) -> Table:
    """Tokens by modality and role, padding and supervised tokens."""
    tokens: TokenMap = batch["tokens"]
    live = ~tokens.is_pad
    counts = Counter(
        (Modality(m).name.lower(), Role(r).name.lower())
        for m, r in zip(tokens.modality[live].tolist(), tokens.role[live].tolist(), strict=True)
    )
    table = Table(box=None, title=f"batch {list(tokens.shape)}", title_justify="left", pad_edge=False)
    table.add_column("tokens")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    total = tokens.modality.numel()
    rows = [(f"{modality}, {role}", count) for (modality, role), count in sorted(counts.items())]
    rows += [("padding", int(tokens.is_pad.sum())), ("supervised", int((batch["labels"] != IGNORED_LABEL).sum()))]
    for name, count in rows:
        table.add_row(name, f"{count:,}", f"{count / total:.1%}")
    return table


def sample_text(batch: dict[str, Any], processor: MultimodalProcessor, sample: int) -> Text:
    """One sample as text: runs of image tokens counted, supervised tokens in colour."""
    tokens: TokenMap = batch["tokens"]
    ids, labels, modality = (value[sample].tolist() for value in (batch["input_ids"], batch["labels"], tokens.modality))
    live = (~tokens.is_pad[sample]).tolist()
    text = Text(f"{batch['keys'][sample]}: ")
    run = 0
    for slot in range(len(ids)):
        if live[slot] and modality[slot] != Modality.TEXT:
            run += 1
            if slot + 1 == len(ids) or modality[slot + 1] == Modality.TEXT:
                text.append(f"[{Modality(modality[slot]).name.lower()} ×{run}]", style="cyan")
                run = 0
        elif live[slot]:
            word = processor.tokenizer.decode([ids[slot]])
            text.append(word, style="bold green" if labels[slot] != IGNORED_LABEL else "")
    text.append("   (green: supervised)", style="dim")
    return text


def show_mask(console: Console, tokens: TokenMap, fusion: Fusion, sample: int, picture: Path) -> None:
    """Draw one sample's mask into `picture`, and into the terminal if it fits."""
    row = tokens.rows(sample)
    row = row.select(~row.is_pad)
    visibility = fusion.visibility(row)
    visibility.plot(picture)
    if len(row) <= min(WIDEST_ASCII, console.width - 4):
        console.print(str(visibility), highlight=False, markup=False)
    console.print(f"mask: {picture}\n", highlight=False)
