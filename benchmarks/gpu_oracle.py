"""The Triton kernels on the machine at hand: right, the same bits each time, and (with --time) how fast.

    python benchmarks/gpu_oracle.py --device cuda --repeats 30
    python benchmarks/gpu_oracle.py --device cuda --repeats 1 --lengths 2048 8192 --time
    TRITON_INTERPRET=1 python benchmarks/gpu_oracle.py --device cpu --lengths 70 --head-dims 64 --masks mma

Errors of output, shares and gradients of q, k, v and the bias are norms against float64, and may be twice those of the
reference in the same dtype. Times are medians with a cold second-level cache; useful FLOPs count visible pairs alone,
the backward 2.5 times the forward, and a roofline is the card's dense tensor peak in 16 bits.
"""

from __future__ import annotations

import argparse
import sys

import torch
from cards import beside_goals
from torch import Tensor

from mmfuse.kernels import Visibility, attend, attend_with_shares, plan_blocks
from mmfuse.training.kernels import example

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: The float64 truth holds all scores; longer sequences are only timed.
LONGEST_TRUTH = 2048


def draw(visibility: Visibility, width: int, dtype: torch.dtype, device: str, heads: tuple[int, int]) -> list[Tensor]:
    """q, k, v and a bias, the same for every device."""
    torch.manual_seed(0)
    batch, queries, keys = visibility.shape
    shapes = [(batch, heads[0], queries, width), *[(batch, heads[1], keys, width)] * 2]
    classes = len(visibility.names)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes] + [torch.randn(heads[0], classes, classes)]
    return [x.to(device).requires_grad_() for x in inputs]


def results(inputs: list[Tensor], visibility: Visibility, backend: str) -> list[Tensor]:
    """Output, shares and all gradients along directions that are the same each time."""
    q, k, v, bias = inputs
    outputs = attend_with_shares(q, k, v, visibility, bias=bias, backend=backend)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, directions)]


def check(visibility: Visibility, inputs: list[Tensor], repeats: int) -> list[str]:
    """What is wrong; nothing if all is well."""
    first = results(inputs, visibility, "triton")
    faults = []
    for _ in range(repeats - 1):
        again = results(inputs, visibility, "triton")
        if not all(torch.equal(x, y) for x, y in zip(first, again, strict=True)):
            faults.append("another run gave other bits")
            break
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(wide, visibility, "reference")
    plain = results(inputs, visibility, "reference")
    for name, mine, theirs, exact in zip(
        ("out", "shares", "dq", "dk", "dv", "d_bias"), first, plain, truth, strict=True
    ):
        error, allowed = (float((x.double() - exact).norm()) for x in (mine, theirs))
        # Where plain torch happens to be exact, a rounding of the result itself is still allowed.
        allowed = max(2 * allowed, float(exact.norm()) * torch.finfo(mine.dtype).eps)
        if not error <= allowed:
            faults.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    return faults


def speed(visibility: Visibility, mask: str, inputs: list[Tensor]) -> str:
    """TFLOP/s forward and backward, their share of the roofline, and the goal."""
    from triton.testing import do_bench

    q, k, v, _ = inputs
    plan, heads, width = plan_blocks(visibility), q.shape[1], q.shape[3]
    out = attend(q, k, v, visibility, backend="triton")
    direction = torch.randn_like(out)
    with torch.no_grad():
        forward = do_bench(lambda: attend(q, k, v, visibility, backend="triton"), return_mode="median")
    backward = do_bench(
        lambda: torch.autograd.grad(out, inputs[:3], direction, retain_graph=True), return_mode="median"
    )
    return beside_goals(mask, width, plan.useful_flops(heads, width), forward / 1e3, backward / 1e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--lengths", type=int, nargs="+", default=[130, 1000])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 80, 96, 128, 256])
    parser.add_argument("--masks", nargs="+", default=["causal", "packed", "mma", "naavit", "prefix_lm"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float16"])
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 2], metavar=("QUERY", "KEY"))
    parser.add_argument("--time", action="store_true", help="time what is right")
    options = parser.parse_args()
    red = False
    for mask in options.masks:
        for length in options.lengths:
            visibility = example(mask, length).to(options.device)
            for width in options.head_dims:
                for dtype in options.dtypes:
                    inputs = draw(visibility, width, DTYPES[dtype], options.device, tuple(options.heads))
                    faults = check(visibility, inputs, options.repeats) if length <= LONGEST_TRUTH else []
                    told = "; ".join(faults) or ("right" if length <= LONGEST_TRUTH else "not checked")
                    if options.time and not faults:
                        told += ", " + speed(visibility, mask, inputs)
                    print(f"{mask} {length} × {width} {dtype}: {told}", flush=True)
                    red |= bool(faults)
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
