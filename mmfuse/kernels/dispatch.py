"""The table of backends, and the rule by which `auto` chooses one.

| backend      | runs                                                    | refuses                                |
|--------------|---------------------------------------------------------|----------------------------------------|
| `reference`  | softmax written out, any float dtype, any device        | nothing                                |
| `sdpa`       | torch's fused attention: no mask, causal, or dense mask | nothing                                |
| `rectangles` | torch's fused attention on each rectangle of the mask   | devices other than the CPU; masks that |
|              |                                                         | a window or SELF cuts; more than 1,024 |
| `flex`       | FlexAttention on the planner's block mask               | gradients on the CPU                   |
| `flex_flash` | the same by FlashAttention 4; experimental              | all but NVIDIA from Hopper on with     |
|              |                                                         | flash-attn-4; numbers wider than 16    |
|              |                                                         | bits                                   |
| `triton`     | our kernels over the planner's tile lists               | the CPU, but in the interpreter; heads |
|              |                                                         | wider than 256                         |

`auto` is `sdpa` where that needs no dense mask, and otherwise the cheaper of `sdpa` and `rectangles` by predicted cost.
`mmfuse kernels` prints the choice for a shape, and why. A new backend is one more line of `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from mmfuse.kernels import flex, merged, reference, sdpa
from mmfuse.kernels.call import Call
from mmfuse.kernels.classes import Statistics
from mmfuse.kernels.rectangles import Rectangle, rectangle_cover
from mmfuse.kernels.triton import refusal as triton_refusal
from mmfuse.kernels.triton import triton_attention, triton_statistics, triton_with_shares
from mmfuse.kernels.visibility import Visibility

# The cost rule, fitted to forward and backward passes on the CPU (float32, 16 heads of width 64, N = 256 to 2048, see
# benchmarks/attention.py). The unit is what a pair of a dense mask costs. A full rectangle costs its area. The fused
# kernel leaves out of a causal square only blocks of this side that lie wholly above the diagonal:
CAUSAL_BLOCK = 512
# Each rectangle, and finding them all, costs as much as these pairs of one head of width 64 besides:
PAIRS_PER_CALL = 100_000
# and below this mask that alone is more than can be saved.
SMALLEST_MASK = 256 * 256

#: `rectangles` must promise to take less than this share of the cost of `sdpa`: predictions are not exact.
WORTH_IT = 0.95


WithShares = Callable[[Tensor, Tensor, Tensor, Visibility, float, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
StatisticsOf = Callable[[Tensor, Tensor, Visibility, float, Tensor | None, Tensor | None], Statistics]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    Attributes:
        run: called with q, k, v, visibility, scale and mass.
        refusal: why it cannot run a call, or None if it can.
        tiled: whether its cost is that of the tiles of a plan, so that an order of tokens that fills fewer pays.
        with_shares: called with these and a bias by class; the output and the shares of each class. None where `run`
            gives them through columns of keys and values.
        statistics: called with q, k, visibility, scale, mass and bias; None where there are none.
    """

    run: Callable[[Tensor, Tensor, Tensor, Visibility, float, Tensor | None], Tensor]
    refusal: Callable[[Visibility, Call], str | None]
    tiled: bool = False
    with_shares: WithShares | None = None
    statistics: StatisticsOf | None = None


def _never_refuses(visibility: Visibility, call: Call) -> None:
    return None


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "reference": Backend(
            reference.reference,
            _never_refuses,
            with_shares=reference.reference_with_shares,
            statistics=reference.reference_statistics,
        ),
        "sdpa": Backend(sdpa.sdpa, _never_refuses),
        "rectangles": Backend(merged.rectangles, merged.refusal),
        "flex": Backend(flex.flex, flex.refusal, tiled=True),
        "flex_flash": Backend(flex.flex_flash, flex.flash_refusal, tiled=True),
        "triton": Backend(triton_attention, triton_refusal, True, triton_with_shares, triton_statistics),
    }
)

#: What a config or a caller may ask for.
BACKEND_NAMES = ("auto", *BACKENDS)


@dataclass(frozen=True)
class Choice:
    """What `auto` runs, and why, in words."""

    backend: str
    reason: str


def choose(visibility: Visibility, call: Call) -> Choice:
    """The backend that `auto` stands for."""
    samples, queries, keys = visibility.shape
    if call.device != "cpu":
        return Choice("sdpa", f"rectangles run on the CPU alone, this is {call.device}")
    if queries * keys < SMALLEST_MASK:
        return Choice("sdpa", f"a mask of {queries} × {keys} is too small for rectangles to pay")
    if not call.with_mass and (visibility.is_full() or visibility.is_causal()):
        return Choice("sdpa", "the mask is causal over whole samples: the fused kernel needs no mask")
    cover = rectangle_cover(visibility)
    if cover.problem is not None:
        return Choice("sdpa", f"the mask is no set of rectangles: {cover.problem}")
    pairs, count = samples * queries * keys, len(cover.rectangles)
    overhead = PAIRS_PER_CALL * (count + 1) * 64 / (call.heads * call.width)
    share = (sum(_cost(rectangle) for rectangle in cover.rectangles) + overhead) / pairs
    told = (
        f"{count} rectangles hold {cover.pairs / pairs:.0%} of the pairs; predicted: {share:.2f} of a dense mask's cost"
    )
    return Choice("rectangles" if share < WORTH_IT else "sdpa", told)


def _cost(rectangle: Rectangle) -> float:
    if not rectangle.causal:
        return rectangle.pairs
    side = rectangle.query_stop - rectangle.query
    return (rectangle.sample_stop - rectangle.sample) * side * (side + min(side, CAUSAL_BLOCK)) / 2
