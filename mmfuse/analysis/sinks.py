"""Visual attention sinks: media tokens that receive far more attention than the others, whatever is asked.

A media token counts as a sink of a layer if it receives more than `SINK` times the mean that media tokens receive from
the rows that predict the answer. Deliberate difference from arXiv 2503.03321, which finds sinks by massive activations
in hidden states: here by the attention itself, so that no dimension has to be known for each decoder family.

Shapes: `B` samples, `H` heads, `S` tokens, `L` layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfuse.analysis.attention import answer_rows
from mmfuse.analysis.mode import evaluation_mode
from mmfuse.models import MultimodalLM
from mmfuse.sequence import TokenMap

#: How many times the mean makes a sink.
SINK = 5.0


def sink_share(received: Tensor) -> Tensor:
    """Of the attention that media tokens receive `[..., V]`, the share of sinks `[...]`; 0 without any."""
    total = received.sum(-1, keepdim=True)
    sinks = received * (received * received.shape[-1] > SINK * total)
    return torch.where(total[..., 0] > 0, sinks.sum(-1) / total[..., 0].clamp(min=1e-30), 0.0)


def visual_sinks(model: MultimodalLM, batch: Mapping[str, Any]) -> Tensor:
    """The share of visual attention that falls on sinks, float64 `[B, L]`.

    Weights are reduced layer by layer; none is kept.

    Args:
        model: in any mode.
        batch: dialogues that hold their answers and media, one document in a row.

    Raises:
        ValueError: a sample without media or without an answer.
    """
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    tokens: TokenMap = inputs["tokens"]
    rows, media = answer_rows(tokens), tokens.is_media
    if not bool((rows.any(1) & media.any(1)).all()):
        raise ValueError("sinks are looked for in samples that hold media and an answer")
    found: dict[int, Tensor] = {}

    def record(layer: int, weights: Tensor) -> None:
        received = torch.einsum("bhqk,bq->bk", weights.double(), rows.double())
        found[layer] = torch.stack([sink_share(own[mine]) for own, mine in zip(received, media, strict=True)])

    with evaluation_mode(model), torch.inference_mode():
        model(**inputs, return_logits=False, record=record)
    return torch.stack([found[layer] for layer in sorted(found)], dim=1).cpu()
