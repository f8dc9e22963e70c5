"""What GPUs can do at most, and what we aim for on them: attention's TFLOP/s beside roofline and goals.

Useful FLOPs count visible pairs alone, the backward pass 2.5 times the forward one.
"""

from __future__ import annotations

import torch

#: Dense tensor-core TFLOP/s in 16 bits, by a part of the card's name.
PEAKS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
#: TFLOP/s forward, backward and of both together that we aim for: (card, mask, head dim).
GOALS = {
    ("H100", "causal", 128): (430, 280, None),
    ("H100", "packed", 128): (240, 155, None),
    ("H100", "causal", 64): (380, None, None),
    ("A100", "causal", 128): (None, None, 140),
    ("A100", "causal", 64): (155, None, None),
}
#: How many times faster than another backend we aim to be, forward and backward, where the mask is neither causal nor
#: packed: (card, head dim, the other backend).
RATIO_GOALS = {("H100", 128, "flex"): (1.4, 1.4), ("H100", 128, "sdpa"): (6.0, 4.0)}


def beside_goals(mask: str, width: int, flops: int, forward: float, backward: float, card: str | None = None) -> str:
    """TFLOP/s forward, backward and together, their share of the card's peak, and the goals.

    Args:
        mask: its name.
        width: of a head.
        flops: of a forward pass.
        forward: seconds.
        backward: seconds.
        card: the name of a GPU; the one at hand if None.
    """
    card = torch.cuda.get_device_name() if card is None else card
    rates = [flops / forward / 1e12, 2.5 * flops / backward / 1e12, 3.5 * flops / (forward + backward) / 1e12]
    told = f"{' / '.join(f'{rate:.0f}' for rate in rates)} TFLOP/s"
    for name, peak in PEAKS.items():
        if name in card:
            told += f" ({' / '.join(f'{rate / peak:.0%}' for rate in rates)} of {peak:.0f})"
    for (name, *case), goal in GOALS.items():
        if name in card and case == [mask, width]:
            told += f", goal {' / '.join('-' if each is None else str(each) for each in goal)}"
    return told


def ratio_goals(mask: str, width: int, card: str | None = None) -> str:
    """How much faster than other backends we aim to be, or nothing."""
    card = torch.cuda.get_device_name() if card is None else card
    if mask in ("causal", "packed"):
        return ""
    told = [
        f"{forward:g} / {backward:g} × {other}"
        for (name, goal_width, other), (forward, backward) in RATIO_GOALS.items()
        if name in card and goal_width == width
    ]
    return f"goals for triton: {', '.join(told)}" if told else ""
