"""`mmfuse kernels`: which attention backend runs a mask of a shape, and why the others do not."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from mmfuse.errors import ConfigError, unknown
from mmfuse.fusion import CLASSES, FUSIONS, NAAViT
from mmfuse.fusion.base import CAUSAL_RULES, MEDIA, axis_of
from mmfuse.kernels import BACKENDS, Call, Condition, Visibility, choose, plan_blocks
from mmfuse.kernels.neighbourhood import Window2D
from mmfuse.kernels.triton import DTYPES as TRITON_DTYPES
from mmfuse.sequence import TokenMap
from mmfuse.training.commands import StrictParser

if TYPE_CHECKING:
    # Triton is imported where a GPU is at hand.
    from mmfuse.kernels.triton.launch import Launch
    from mmfuse.kernels.triton.tuning import Trial

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
MASKS = ("packed", "no_image_to_image", "window_2d", *FUSIONS)


def main(argv: Sequence[str]) -> int:
    """Run the command; `argv` begins with its name."""
    options = _parser().parse_args(argv[1:])
    visibility = example(options.mask, options.length, options.batch)
    if options.tune:
        return _tune(visibility, options)
    call = Call(options.heads, options.head_dim, DTYPES[options.dtype], options.device, options.backward)
    choice, plan = choose(visibility, call), plan_blocks(visibility)
    table = Table("backend", "auto", "why", box=None, title=None)
    for name, backend in BACKENDS.items():
        refusal = backend.refusal(visibility, call)
        chosen = name == choice.backend
        why = choice.reason if chosen else f"refuses: {refusal}" if refusal else "can run this, if asked for by name"
        table.add_row(name, "runs" if chosen else "", why)
    console = Console(highlight=False)
    direction = "forward and backward" if options.backward else "forward"
    console.print(
        f"{options.mask}, {options.batch} × {options.length} tokens, {options.heads} heads × {options.head_dim}, "
        f"{options.dtype}, {options.device}, {direction}"
    )
    console.print(
        f"{plan.density:.1%} of the pairs are visible; tiles of 64 × 64: {plan.full} full, {plan.partial} partial of "
        f"{len(plan.words)} kinds, {plan.tile_efficiency:.0%} of what they hold is visible; "
        f"{plan.useful_flops(options.heads, options.head_dim, backward=options.backward):.3g} useful FLOPs"
    )
    console.print(table)
    return 0


def _tune(visibility: Visibility, options: argparse.Namespace) -> int:
    """Measure the launches of the Triton kernels on the GPU at hand, keep the fastest, and print all."""
    if options.device != "cuda" or not torch.cuda.is_available():
        found = "there is one" if torch.cuda.is_available() else "torch finds none here"
        raise ConfigError(f"kernels: --tune measures on a GPU: it needs --device cuda, and {found}")
    if DTYPES[options.dtype] not in TRITON_DTYPES:
        raise ConfigError(f"kernels: the Triton kernels do not take {options.dtype} on a GPU")
    from triton.testing import do_bench

    from mmfuse.kernels.triton.measure import measure_launches
    from mmfuse.kernels.triton.tuning import fastest, keep, launches_file

    shape = (options.batch, options.heads, options.length, options.head_dim)
    q, k, v = (torch.randn(shape, dtype=DTYPES[options.dtype], device="cuda") for _ in range(3))
    gpu = torch.cuda.get_device_name()
    plan = plan_blocks(visibility.to("cuda"))
    console = Console(highlight=False)
    with console.status("each launch is compiled and timed; this takes minutes"):
        trials = measure_launches(q, k, v, plan, lambda run: do_bench(run, return_mode="median"))
    for kernel, tried in trials.items():
        best = fastest(tried)
        if best is not None:
            keep(kernel, options.head_dim, q.itemsize, gpu, best)
        console.print(trial_table(kernel, tried, best))
    console.print(f"kept for {gpu} in {launches_file()}")
    return 0


def trial_table(kernel: str, trials: Sequence[Trial], best: Launch | None) -> Table:
    """A table of the launches of a kernel, the built-in one first."""
    table = Table("rows", "columns", "warps", "stages", "ms", "", box=None, title=kernel, title_justify="left")
    for i, trial in enumerate(trials):
        told = [trial.problem or "", "built in" if i == 0 else "", "fastest" if trial.launch == best else ""]
        time = "" if trial.time is None else f"{trial.time:.3f}"
        table.add_row(*map(str, trial.launch), time, ", ".join(filter(None, told)))
    return table


def example(mask: str, length: int, batch: int = 1) -> Visibility:
    """The mask of a strategy over 32 tokens of text, an image of up to 576 and text, or one over the same samples.

    - `packed`: four such samples in a row, causal;
    - `no_image_to_image`: text is causal, the image sees the text before it, and not itself;
    - `window_2d`: text is causal, the image is a square grid in which each place sees 7 × 7 around it.

    Raises:
        ConfigError: an unknown mask, or fewer than 8 tokens.
    """
    if mask not in MASKS:
        raise ConfigError(unknown("mask", mask, MASKS))
    if length < 8 or batch < 1:
        raise ConfigError(f"kernels: a sample has at least 8 tokens and a batch one sample, got {batch} × {length}")
    if mask == "packed":
        sizes = [length // 4] * 3 + [length - length // 4 * 3]
        tokens = TokenMap.pack([_sample(size) for size in sizes])
        return FUSIONS["causal"]().visibility(tokens.repeat(batch))
    if mask == "no_image_to_image":
        return NAAViT(reading="text_only").visibility(_sample(length).repeat(batch))
    if mask == "window_2d":
        axis = axis_of(_on_grid(length).repeat(batch), window=Window2D((7, 7)))
        return Visibility(axis, axis, {**CAUSAL_RULES, (MEDIA, MEDIA): (Condition.WINDOW_2D,)}, CLASSES)
    return FUSIONS[mask]().visibility(_sample(length).repeat(batch))


def _sample(length: int) -> TokenMap:
    before, image = min(32, max(1, length // 8)), min(576, max(1, length // 2))
    runs = [("text", before), ("image", image), ("text", length - before - image)]
    return TokenMap.from_layout([run for run in runs if run[1]])


def _on_grid(length: int) -> TokenMap:
    """As `_sample`, but the image is the largest square that fits into it, and its tokens have places."""
    before, side = min(32, max(1, length // 8)), math.isqrt(min(576, max(1, length // 2)))
    after = length - before - side**2
    tokens = TokenMap.from_layout([("text", before), ("image", side**2), ("text", after)])
    places = [(0, 0, 0)] * before + [(0, y, x) for y in range(side) for x in range(side)] + [(0, 0, 0)] * after
    return replace(tokens, grid=torch.tensor([places]))


def _parser() -> StrictParser:
    parser = StrictParser("kernels", "Which attention backend runs a mask of a shape, and why.")
    parser.add_argument("--mask", default="mma", metavar="NAME", help=f"{', '.join(MASKS)} (default: mma)")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a sample (default: 2048)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="samples (default: 1)")
    parser.add_argument("--heads", type=int, default=16, metavar="N", help="of queries (default: 16)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="width of a head (default: 64)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of q, k and v (default: float32)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--tune", action="store_true", help="time the Triton kernels' launches, keep the fastest")
    parser.add_argument("--backward", action="store_true", help="gradients are asked for, too")
    return parser
