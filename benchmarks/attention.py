"""Attention backends side by side on the CPU: time and memory, as ratios to torch's SDPA with a dense mask.

    python benchmarks/attention.py --lengths 2048 4096 --masks naavit mma no_image_to_image packed prefix_lm

Forward and backward, the lowering of the mask included in each run as it is in each training step. Runs of the backends
alternate, and medians are compared. A row is printed only if outputs and gradients agree with the dense mask.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmfuse.fusion import NAAViT
from mmfuse.kernels import BACKENDS, Call, Visibility, attend, choose, plan_blocks, rectangle_cover
from mmfuse.sequence import TokenMap
from mmfuse.training.kernels import MASKS, example

NO_IMAGE = "no_image_to_image"
TOLERANCE = 1e-4


def make_visibility(mask: str, length: int) -> Visibility:
    if mask != NO_IMAGE:
        return example(mask, length)
    runs = [("text", 32), ("image", 576), ("text", length - 608)]
    return NAAViT(reading="text_only").visibility(TokenMap.from_layout(runs))


def draw(length: int, heads: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, width, requires_grad=True) for _ in range(3)]


def fresh(visibility: Visibility) -> Visibility:
    """The same mask, of which nothing is known yet."""
    return Visibility(visibility.queries, visibility.keys, visibility.rules, visibility.names, visibility.window)


def run(visibility: Visibility, inputs: list[Tensor], direction: Tensor, backend: str) -> tuple[Tensor, ...]:
    out = attend(*inputs, visibility, backend=backend)
    return out.detach(), *torch.autograd.grad(out, inputs, direction)


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak(mask: str, length: int, heads: int, width: int, backend: str, threads: int) -> float:
    """MiB that one forward and backward pass adds at its peak, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_peak, (mask, length, heads, width, backend, threads)))


def _peak(mask: str, length: int, heads: int, width: int, backend: str, threads: int) -> float:
    torch.set_num_threads(threads)
    inputs, small = draw(length, heads, width), draw(64, heads, width)
    direction = torch.randn_like(inputs[0])
    # What the first call loads belongs to no mask.
    run(make_visibility("mma", 64), small, torch.randn_like(small[0]), backend)
    visibility = make_visibility(mask, length)
    before = _high_water(reset=True)
    run(visibility, inputs, direction, backend)
    return _high_water() - before


def _high_water(reset: bool = False) -> float:
    """The process's peak resident memory in MiB, since the last reset (Linux; `ru_maxrss` counts the parent's, too)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def compare(mask: str, length: int, options: argparse.Namespace) -> None:
    visibility = make_visibility(mask, length)
    inputs = draw(length, options.heads, options.head_dim)
    direction = torch.randn_like(inputs[0])
    call = Call(options.heads, options.head_dim, differentiable=True)
    names = [name for name in ("sdpa", "rectangles") if BACKENDS[name].refusal(visibility, call) is None]
    wanted = run(visibility, inputs, direction, "sdpa")
    for name in names:
        for mine, theirs in zip(run(visibility, inputs, direction, name), wanted, strict=True):
            error = float((mine - theirs).abs().max() / theirs.abs().max())
            if not error <= TOLERANCE:
                raise SystemExit(
                    f"{mask}, {length}: {name} differs from the dense mask by {error:.1e}; nothing to report"
                )
    times: dict[str, list[float]] = {name: [] for name in [*names, "auto"]}
    for turn in range(options.rounds):
        # Each goes first as often as the others: what a run leaves in caches and allocator slows or speeds the next.
        order = list(times)[turn % len(times) :] + list(times)[: turn % len(times)]
        for name in order:
            lowered = fresh(visibility)
            times[name].append(seconds(lambda: run(lowered, inputs, direction, name)))  # noqa: B023
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    planning = statistics.median(seconds(lambda: plan_blocks(fresh(visibility))) for _ in range(5))
    memory = {}
    if options.memory:
        memory = {name: peak(mask, length, options.heads, options.head_dim, name, options.threads) for name in names}
    cover = rectangle_cover(visibility)
    cells = [f"{mask:<18} {length:>6} {len(cover.rectangles):>4} rect {choose(visibility, call).backend:<10}"]
    for name, median in medians.items():
        text = f"{name} {median * 1e3:.1f} ms ×{medians['sdpa'] / median:.2f}"
        if name in memory:
            text += f" {memory[name]:.0f} MiB ({memory[name] / max(memory['sdpa'], 1):.2f})"
        cells.append(text)
    print(" | ".join([*cells, f"plan {planning * 1e3:.1f} ms"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    masks = [*MASKS, NO_IMAGE]
    parser.add_argument("--masks", nargs="+", choices=masks, default=["causal", "packed", "mma", NO_IMAGE, "naavit"])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a process of its own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("forward + backward, float32; ×: how much faster than sdpa; (…): peak memory against sdpa's", flush=True)
    for length in options.lengths:
        for mask in options.masks:
            compare(mask, length, options)


if __name__ == "__main__":
    main()
