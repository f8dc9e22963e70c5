"""Whether the tests of the Triton kernels would see a mistake: each mutant breaks one line of them and must fail."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mmfuse.kernels.triton
from mmfuse.kernels.plan import BlockPlan

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.usefixtures("poisoned")]

SOURCE = Path(mmfuse.kernels.triton.__file__).parent
INF = 'float("-inf")'

#: File, what stands there, and what the mutant has instead.
MUTANTS = {
    "another key head": ("forward", "(head // GROUP)", "(head % GROUP)"),
    "no guard of rows without keys": ("forward", f"tl.where(new_peak == {INF}, 0.0, new_peak)", "new_peak"),
    "sum not faded": ("forward", "out * fade[:, None]", "out"),
    "denominator not faded": ("forward", "total * fade +", "total +"),
    "hidden is merely small": ("forward", f"tl.where(seen, scores, {INF})", "tl.where(seen, scores, -9.0)"),
    "partial list too short": (
        "forward", "tl.load(PARTIAL_OFFSETS + place + 1) * STEPS", "tl.load(PARTIAL_OFFSETS + place + 1) * STEPS - 1",
    ),
    "full list too short": (
        "forward", "tl.load(FULL_OFFSETS + place + 1) * STEPS", "tl.load(FULL_OFFSETS + place + 1) * STEPS - 1",
    ),
    "mass not counted": ("forward", f"tl.where(peak == {INF}, 0.0, 1.0)", f"tl.where(peak == {INF}, 0.0, 0.0)"),
    "bits swapped": (
        "primitives", "narrow[:, None] >> tl.arange(0, C)[None, :]", "narrow[:, None] >> (tl.arange(0, C) ^ 1)[None]",
    ),
    "first rows of the tile": ("primitives", "* ROWS + first_row + tl", "* ROWS + tl"),
    "first word of the row": ("primitives", "(COLUMNS // 64) + first_column // 64", "(COLUMNS // 64)"),
    "first bits of the word": ("primitives", "(first_column % 64)", "(first_column * 0)"),
    "rows behind the end": ("primitives", "mask=(rows[:, None] < length) & (columns[None, :] < D), other=0.0)\n    if",
                            "mask=columns[None, :] < D, other=0.0)\n    if"),
    "columns behind the end": ("primitives", "return tl.load(pointers, mask=columns[None, :] < D, other=0.0)",
                               "return tl.load(pointers)"),
    "first sample": ("primitives", "return place, place // blocks,", "return place, place * 0,"),
    "dq without delta": ("backward", " - delta[:, None]", ""),
    "dk without delta": ("backward", " - delta[None, :]", ""),
    "gradient of rows without keys": ("backward", f'tl.where(lse == {INF}, float("inf"), lse)', "lse"),
    "scale of dq": ("backward", "dq * softmax_scale", "dq * scale"),
    "scale of dk": ("backward", "dk * softmax_scale", "dk * scale"),
    "one head of the group": ("backward", "for member in range(GROUP)", "for member in range(1)"),
    "sign of the log-sum-exp": ("backward", "delta -= tl.load(D_LSE", "delta += tl.load(D_LSE"),
    "gradient of the mass": ("operator", "delta.transpose(0, 1)).sum(0)", "delta.transpose(0, 1)).mean(0)"),
    "shares not faded": ("forward", "shares * fade[:, None]", "shares"),
    "bias of another class": (
        "primitives", "tl.arange(0, 16)[None, :] % 8, 1.0", "(tl.arange(0, 16)[None, :] + 1) % 8, 1.0",
    ),
    "gradient of the shares' rows": ("backward", "delta += tl.sum(shares * d_shares, 1)", "delta += 0.0"),
    "no bias in dk": ("backward", "scores = dot_onto(one_hot, tl.trans(bias), scores, PRECISION)", "scores += 0.0"),
    "shares not in dv's weights": (
        "backward", "d_weights = dot_onto(one_hot, tl.trans(d_shares), d_weights, PRECISION)", "d_weights += 0.0",
    ),
    "gradient of the bias": ("operator", "d_bias * LN2", "d_bias"),
    "statistics without the mass": (
        "statistics", "tl.math.exp2(rest - larger) + tl.math.exp2(mass - larger)", "tl.math.exp2(rest - larger)",
    ),
    "moment not faded": ("statistics", "(moment + total * step) * fade", "(moment + total * step)"),
    "moment of another peak": ("statistics", "(moment + total * step)", "(moment)"),
    "sign of the moment": ("statistics", "rest * total - moment", "rest * total + moment"),
    "hidden is counted": ("statistics", f"tl.where(seen, scores, {INF})", "tl.where(seen, scores, -9.0)"),
    "shares of another peak": ("statistics", "shares * fade[:, None]", "shares"),
    "parts not weighed": ("decode", "parts * shares[:, None]", "parts"),
    "share too short": ("decode", "tl.minimum(start + (split + 1)", "tl.minimum(start + split"),
    "first query": ("decode", "(head % GROUP) * length_q + query\n", "(head % GROUP) * length_q\n"),
    "mass twice": ("decode", "total += tl.math.exp2(mass - base)", "total += 2 * tl.math.exp2(mass - base)"),
}  # fmt: skip
#: Differ from the original in nothing that can be seen.
EQUIVALENT = {
    "nothing": ("forward", "", ""),
    "any order of work": ("primitives", "tl.load(ORDER + program // (BLOCK // R))", "program // (BLOCK // R)"),
}


def mutated(where: Path, name: str, change: tuple[str, str, str]) -> ModuleType:
    """The operators over a copy of the kernels with one change."""
    package = f"mutant_{abs(hash(name))}"
    file, old, new = change
    shutil.copytree(SOURCE, where / package, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    assert old in (where / package / f"{file}.py").read_text(), "the mutant has lost its line"
    for path in (where / package).glob("*.py"):
        text = path.read_text().replace(old, new) if path.stem == file and old else path.read_text()
        path.write_text(text.replace("mmfuse.kernels.triton.", f"{package}.").replace('"mmfuse::', f'"{package}::'))
    sys.path.insert(0, str(where))
    try:
        return importlib.import_module(f"{package}.operator")
    finally:
        sys.path.remove(str(where))


def guarded(batch: int, heads: int, length: int) -> Tensor:
    """`[B, H, S, 80]` amid NaN."""
    around = torch.full((batch, heads, length + 160, 128), torch.nan, dtype=torch.float64)
    inner = around[:, :, 80:-80, :80]
    return inner.copy_(torch.randn(inner.shape, dtype=torch.float64)).detach()


def results(operator: ModuleType, plan: BlockPlan, last: BlockPlan, *, with_mass: bool) -> list[Tensor]:
    """Output, log-sum-exp and gradients of a prefill, and output and log-sum-exp of its last rows decoded.

    With a mass, the prefill has a bias by class and shares, too, and there are the statistics of its rows.
    """
    torch.manual_seed(0)
    q, k, v = (guarded(2, heads, plan.keys).requires_grad_() for heads in (4, 2, 2))
    mass = torch.randn(2, plan.queries, dtype=torch.float64, requires_grad=True) if with_mass else None
    bias, classes = None, None
    if with_mass:
        bias = torch.randn(2, 4, plan.queries, 8, dtype=torch.float64, requires_grad=True)
        classes = torch.randint(0, 3, (2, plan.keys))
    outputs = operator.masked_attention(q, k, v, plan, scale=0.3, mass=mass, bias=bias, classes=classes)
    outputs = outputs if with_mass else outputs[:2]
    inputs = [x for x in (q, k, v, mass, bias) if x is not None]
    gradients = torch.autograd.grad(outputs, inputs, [torch.randn_like(x) for x in outputs])
    statistics: tuple[Tensor, ...] = ()
    if classes is not None:
        statistics = operator.masked_statistics(
            q.detach(), k.detach(), plan, classes, scale=0.3, mass=mass.detach(), bias=bias.detach()
        )
    tail = [x.detach()[:, :, -last.queries :] if x is q else x.detach() for x in (q, k, v)]
    some = None if mass is None else mass.detach()[:, -last.queries :]
    return [
        x.detach()
        for x in (
            *(*outputs, *gradients, *statistics),
            *operator.masked_attention(*tail, last, scale=0.3, mass=some)[:2],
        )
    ]


def agree(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-10) for x, y in zip(mine, theirs, strict=True))


class Original(NamedTuple):
    """What the kernels as they stand give; other tests hold it against the reference."""

    plan: BlockPlan
    last: BlockPlan
    without_mass: list[Tensor]
    with_mass: list[Tensor]


@pytest.fixture(scope="module")
def original(by_force: Callable[..., BlockPlan]) -> Original:
    seen = torch.rand(2, 230, 230, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, :128, :128], seen[:, 200] = True, False
    plan, last = by_force(seen, 128, 128), by_force(seen[:, -5:], 128, 128)
    operator = importlib.import_module("mmfuse.kernels.triton.operator")
    return Original(plan, last, *(results(operator, plan, last, with_mass=with_mass) for with_mass in (False, True)))


def differs(where: Path, name: str, change: tuple[str, str, str], original: Original) -> bool:
    """Whether a mutant is seen."""
    mutant, plan, last = mutated(where, name, change), original.plan, original.last
    return any(
        not agree(results(mutant, plan, last, with_mass=with_mass), expected)
        for with_mass, expected in ((False, original.without_mass), (True, original.with_mass))
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(name: str, tmp_path: Path, original: Original) -> None:
    assert differs(tmp_path, name, MUTANTS[name], original)


@pytest.mark.parametrize("name", EQUIVALENT)
def test_equivalent_changes_are_not(name: str, tmp_path: Path, original: Original) -> None:
    assert not differs(tmp_path, name, EQUIVALENT[name], original)
