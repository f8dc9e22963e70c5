"""Attention backends side by side: time and memory, as ratios to torch's SDPA with a dense mask.

    python benchmarks/attention.py --lengths 2048 4096 --masks naavit mma no_image_to_image window_2d packed prefix_lm
    python benchmarks/attention.py --device cuda --lengths 2048 8192 --heads 32 --head-dim 128

On the CPU forward and backward pass together, the lowering of the mask included in each run as it is in each training
step. FlexAttention has no backward pass there: its column is the forward pass alone, beside SDPA's forward pass alone.

On a GPU forward and backward pass apart, by CUDA events and with a cold second-level cache, of masks that are lowered
already (`plan` is what that costs), in TFLOP/s of the visible pairs beside the card's peak and our goals.

Runs of the backends alternate, and medians are compared. A row is printed only if outputs and gradients agree with
SDPA in float32, as well as those of SDPA itself do in the dtype that is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from cards import beside_goals, ratio_goals
from torch import Tensor

from mmfuse.kernels import BACKENDS, Call, Visibility, attend, choose, plan_blocks, rectangle_cover
from mmfuse.training.kernels import DTYPES, MASKS, example

#: What an error may be of its truth where SDPA itself has a smaller one.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}
#: More than the second-level cache of any card holds, in bytes.
CACHE = 1 << 28

Step = Callable[[], object]


def draw(length: int, options: argparse.Namespace) -> list[Tensor]:
    """q, k, v and the direction of the gradient; the first three are learnt."""
    torch.manual_seed(0)
    drawn = [torch.randn(1, options.heads, length, options.head_dim) for _ in range(4)]
    *inputs, direction = (x.to(options.device, DTYPES[options.dtype]) for x in drawn)
    return [*(x.requires_grad_() for x in inputs), direction]


def fresh(visibility: Visibility) -> Visibility:
    """The same mask, of which nothing is known yet."""
    return Visibility(visibility.queries, visibility.keys, visibility.rules, visibility.names, visibility.window)


def forward(visibility: Visibility, drawn: Sequence[Tensor], backend: str) -> Tensor:
    with torch.no_grad():
        return attend(*drawn[:3], visibility, backend=backend)


def both(visibility: Visibility, drawn: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    out = attend(*drawn[:3], visibility, backend=backend)
    return out.detach(), *torch.autograd.grad(out, drawn[:3], drawn[3])


def seconds(step: Step, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    torch.empty(CACHE, dtype=torch.int8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def medians(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        # Each goes first as often as the others: what a run leaves in caches and allocator slows or speeds the next.
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(steps[name], device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def able(visibility: Visibility, options: argparse.Namespace, *, differentiable: bool) -> list[str]:
    """The backends that can; the reference is no one's choice, and on the CPU Triton is interpreted."""
    call = Call(options.heads, options.head_dim, DTYPES[options.dtype], options.device, differentiable)
    left_out = ("reference", "triton") if options.device == "cpu" else ("reference",)
    return [name for name, each in BACKENDS.items() if name not in left_out and each.refusal(visibility, call) is None]


def check(what: str, visibility: Visibility, drawn: Sequence[Tensor], learning: list[str], others: list[str]) -> None:
    """Stop if a backend errs more than SDPA does; of the `others` the output alone is compared."""
    wide = [x.detach().float().requires_grad_(x.requires_grad) for x in drawn]
    truth = both(visibility, wide, "sdpa")
    plain = both(visibility, drawn, "sdpa")
    for name in [*learning, *others]:
        results = both(visibility, drawn, name) if name in learning else (forward(visibility, drawn, name),)
        for mine, theirs, exact in zip(results, plain, truth, strict=False):
            error, allowed = (float((x.float() - exact).norm() / exact.norm()) for x in (mine, theirs))
            allowed = max(2 * allowed, TOLERANCE[mine.dtype])
            if not error <= allowed:
                raise SystemExit(f"{what}: {name} errs by {error:.1e}, {allowed:.1e} is allowed; nothing to report")


def peak(mask: str, length: int, backend: str, options: argparse.Namespace) -> float:
    """MiB that one forward and backward pass adds at its peak, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_peak, (mask, length, backend, options)))


def _peak(mask: str, length: int, backend: str, options: argparse.Namespace) -> float:
    torch.set_num_threads(options.threads)
    # What the first call loads belongs to no mask.
    both(example("mma", 64).to(options.device), draw(64, options), backend)
    drawn, visibility = draw(length, options), example(mask, length).to(options.device)
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        both(visibility, drawn, backend)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    before = _high_water(reset=True)
    both(visibility, drawn, backend)
    return _high_water() - before


def _high_water(reset: bool = False) -> float:
    """The process's peak resident memory in MiB, since the last reset (Linux; `ru_maxrss` counts the parent's, too)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def on_cpu(visibility: Visibility, drawn: Sequence[Tensor], names: list[str], rounds: int) -> dict[str, str]:
    """What there is to say of each backend."""
    only_forward = ["sdpa", "flex"]
    steps: dict[str, Step] = {name: lambda n=name: both(fresh(visibility), drawn, n) for name in [*names, "auto"]}
    ahead: dict[str, Step] = {name: lambda n=name: forward(fresh(visibility), drawn, n) for name in only_forward}
    taken, taken_ahead = medians(steps, rounds, "cpu"), medians(ahead, rounds, "cpu")
    told = {name: f"{median * 1e3:.1f} ms ×{taken['sdpa'] / median:.2f}" for name, median in taken.items()}
    ratio = taken_ahead["sdpa"] / taken_ahead["flex"]
    return {**told, "flex": f"{taken_ahead['flex'] * 1e3:.1f} ms ×{ratio:.2f} forward only"}


def on_gpu(visibility: Visibility, drawn: Sequence[Tensor], names: list[str], mask: str, rounds: int) -> dict[str, str]:
    """What there is to say of each backend."""
    heads, width, device = drawn[0].shape[1], drawn[0].shape[3], str(drawn[0].device)
    outs = {name: attend(*drawn[:3], visibility, backend=name) for name in names}
    ahead: dict[str, Step] = {name: lambda n=name: forward(visibility, drawn, n) for name in names}
    back: dict[str, Step] = {
        name: lambda o=out: torch.autograd.grad(o, drawn[:3], drawn[3], retain_graph=True) for name, out in outs.items()
    }
    taken, taken_back = medians(ahead, rounds, device), medians(back, rounds, device)
    flops, told = plan_blocks(visibility).useful_flops(heads, width), {}
    for name in names:
        ratios = f"×{taken['sdpa'] / taken[name]:.2f} / ×{taken_back['sdpa'] / taken_back[name]:.2f}"
        told[name] = f"{beside_goals(mask, width, flops, taken[name], taken_back[name])} {ratios}"
    goals = ratio_goals(mask, width)
    return {**told, "": goals} if goals else told


def compare(mask: str, length: int, options: argparse.Namespace) -> None:
    # FlexAttention is compiled for each mask, and torch gives up on a function that it has compiled a few times.
    torch.compiler.reset()
    visibility, drawn = example(mask, length).to(options.device), draw(length, options)
    names = able(visibility, options, differentiable=True)
    others = [name for name in able(visibility, options, differentiable=False) if name not in names]
    check(f"{mask}, {length}", visibility, drawn, names, others)
    if options.device == "cpu":
        told = on_cpu(visibility, drawn, names, options.rounds)
    else:
        told = on_gpu(visibility, drawn, names, mask, options.rounds)
    if options.memory:
        memory = {name: peak(mask, length, name, options) for name in names}
        for name, most in memory.items():
            told[name] += f" {most:.0f} MiB ({most / max(memory['sdpa'], 1):.2f})"
    plan = statistics.median(seconds(lambda: plan_blocks(fresh(visibility)), options.device) for _ in range(5))
    call = Call(options.heads, options.head_dim, DTYPES[options.dtype], options.device, differentiable=True)
    count = len(rectangle_cover(visibility).rectangles)
    cells = [f"{mask:<18} {length:>6} {count:>4} rect {choose(visibility, call).backend:<10}"]
    print(" | ".join([*cells, *(f"{k} {v}".strip() for k, v in told.items()), f"plan {plan * 1e3:.1f} ms"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, cuda: bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    chosen = ["causal", "packed", "mma", "no_image_to_image", "naavit", "window_2d"]
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=chosen)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a process of its own")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    torch.set_num_threads(options.threads)
    passes = "forward + backward" if options.device == "cpu" else "forward / backward (/ both)"
    print(f"{passes}, {options.dtype}; ×: how much faster than sdpa; (…): peak memory against sdpa's", flush=True)
    for length in options.lengths:
        for mask in options.masks:
            compare(mask, length, options)


if __name__ == "__main__":
    main()
