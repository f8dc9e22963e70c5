"""Does attention favour text over media? MDI and AEI (arXiv 2508.10552), from attention mass by modality.

Of `N` visible tokens `Q·N` are text, and text receives the share `A` of the attention of the tokens that are generated:

    MDI = (A / Q) / ((1 - A) / (1 - Q))        how much more a text token receives than a token of another modality
    AEI = A / Q                                 how much more a modality receives than its share of the tokens

so that AEI of text = MDI / (1 + Q (MDI - 1)), and uniform attention has MDI = AEI = 1. Both grow with the number of
media tokens alone; compare models at equal numbers, or strata of them. Attention is no explanation: read both beside
what happens when a modality is taken away.

Deliberate difference: the first token, on which decoders park attention that they do not need, can be left
out of masses and counts.

Shapes: `B` samples, `L` layers, `S` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfuse.analysis.attention import answer_rows
from mmfuse.analysis.mode import evaluation_mode
from mmfuse.models import MultimodalLM
from mmfuse.sequence import Modality, TokenMap


@dataclass(frozen=True)
class Dominance:
    """Attention of answers to text and media.

    Attributes:
        text_share: float64 `[L]`, the share of attention that text receives, mean over heads, answer rows and samples.
        token_share: float64 scalar, the share of visible tokens that are text, mean over the same rows.
        mdi: `[L]`.
        aei: by modality, `[L]`.
    """

    text_share: Tensor
    token_share: Tensor
    mdi: Tensor
    aei: Mapping[str, Tensor]

    def groups(self) -> dict[str, float]:
        """The mean MDI of the early, middle and late third of the layers; of those there are, if fewer than three."""
        parts = dict(zip(("early", "middle", "late"), self.mdi.tensor_split(3), strict=True))
        return {name: float(part.mean()) for name, part in parts.items() if len(part)}


def dominance_index(text_share: Tensor, token_share: Tensor) -> Tensor:
    """MDI of text, elementwise.

    Args:
        text_share: of the attention, 0..1.
        token_share: of the tokens, above 0 and below 1.

    Raises:
        ValueError: there is only text, or none.
    """
    if bool(((token_share <= 0) | (token_share >= 1)).any()):
        raise ValueError("dominance compares text with media: the rows must see tokens of both")
    return (text_share / token_share) / ((1 - text_share) / (1 - token_share))


def efficiency_index(attention_share: Tensor, token_share: Tensor) -> Tensor:
    """AEI of a modality, elementwise: its share of the attention over its share of the tokens."""
    return attention_share / token_share


def modality_dominance(model: MultimodalLM, batch: Mapping[str, Any], *, skip_first: bool = False) -> Dominance:
    """MDI and AEI of the rows that predict the answers of a batch.

    Weights are reduced layer by layer to one number for each modality; none is kept.

    Args:
        model: in any mode.
        batch: what the processor makes of dialogues that hold their answers; one document in a row.
        skip_first: leave each sequence's first token out.

    Raises:
        ValueError: no answers, or rows that see only text or only media.
    """
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    tokens: TokenMap = inputs["tokens"]
    rows = answer_rows(tokens)
    if not bool(rows.any()):
        raise ValueError("dominance needs samples that hold their answers")
    seen = ~tokens.is_pad
    if skip_first:
        seen = seen & (seen.cumsum(1) > 1)
    present = [Modality(value) for value in tokens.modality[seen].unique().tolist()]
    members = torch.stack([seen & (tokens.modality == modality) for modality in present], dim=2).double()
    # Answer rows see their own sequence up to themselves: counts differ from row to row.
    counts = members.cumsum(1)[rows]
    shares: dict[int, Tensor] = {}

    def record(layer: int, weights: Tensor) -> None:
        heads = weights.shape[1]
        mass = torch.einsum("bhqk,bkm->bqm", weights.double(), members) / heads
        own = mass[rows]
        shares[layer] = (own / own.sum(1, keepdim=True)).mean(0)

    with evaluation_mode(model), torch.inference_mode():
        model(**inputs, return_logits=False, record=record)
    attention = torch.stack([shares[layer] for layer in sorted(shares)]).cpu()
    token_shares = (counts / counts.sum(1, keepdim=True)).mean(0).cpu()
    if Modality.TEXT not in present:
        raise ValueError("dominance compares text with media: the rows must see tokens of both")
    text = present.index(Modality.TEXT)
    mdi = dominance_index(attention[:, text], token_shares[text])
    aei = {m.name.lower(): efficiency_index(attention[:, i], token_shares[i]) for i, m in enumerate(present)}
    return Dominance(attention[:, text], token_shares[text], mdi, aei)
