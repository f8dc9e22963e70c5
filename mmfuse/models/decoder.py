"""Our loop over the layers of an unmodified Hugging Face decoder.

The layers are called as their own model calls them, with a Visibility where Hugging Face passes its mask. One attention
function, registered with transformers, hands q, k, v and the Visibility to `mmfuse.kernels.attend` and refuses any
other mask. So PEFT wraps the projections, caches work, and gradient checkpointing is the layers' own.

Shapes: `B` samples, `S` tokens of this call, `D` hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from mmfuse.fusion.base import Fusion, base_visibility
from mmfuse.kernels import Visibility, attend
from mmfuse.kernels.attention import attention_weights
from mmfuse.sequence import TokenMap

#: The name under which our attention function is registered with transformers.
ATTENTION = "mmfuse"

#: `record(layer, weights [B, H, Sq, Sk])`, called by each layer whose attention is being looked at.
Recorder = Callable[[int, Tensor], None]

# What decoders pass to their attention function beside q, k and v, and which changes nothing here: positions are
# already in q and k, and causality is in the Visibility.
_WITHOUT_EFFECT = {"position_ids", "use_cache", "is_causal", "cache_position"}


def visible_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visibility,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attention_backend: str = "auto",
    record: Recorder | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """The attention function of every decoder: `[B, H, S, D]` in, `[B, S, H, D]` out.

    Raises:
        TypeError: the mask is not a Visibility.
        NotImplementedError: the decoder asks for something that would otherwise be ignored (dropout, soft-capping,
            attention sinks, …).
    """
    if not isinstance(attention_mask, Visibility):
        raise TypeError(
            f"{type(module).__name__} runs under attn_implementation={ATTENTION!r} but was given a mask of type "
            f"{type(attention_mask).__name__}; call the model through MultimodalLM, which passes a Visibility"
        )
    refused = {name for name, value in asked.items() if value is not None and name not in _WITHOUT_EFFECT}
    if dropout:
        refused.add("attention dropout")
    if refused:
        raise NotImplementedError(
            f"{type(module).__name__} asks attention for {', '.join(sorted(refused))}, which mmfuse does not compute"
        )
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave q and k in float32, and v comes from a Linear in the lower precision.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    visibility = attention_mask.view(window=sliding_window, keys=key.shape[2])
    if record is not None:
        record(module.layer_idx, attention_weights(query, key, visibility, scale=scaling))  # type: ignore[arg-type]
    out = attend(query, key, value, visibility, scale=scaling, backend=attention_backend)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, visible_attention)


def run_decoder(
    decoder: PreTrainedModel,
    embeds: Tensor,
    tokens: TokenMap,
    fusion: Fusion,
    *,
    cache: Cache | None = None,
    attention_backend: str = "auto",
    record: Recorder | None = None,
) -> Tensor:
    """Run the decoder's layers and final norm.

    Args:
        decoder: a Hugging Face causal LM built with `attn_implementation="mmfuse"`.
        embeds: `[B, S, D]`, the tokens that are new in this call.
        tokens: the map of all tokens, cached ones first: `[B, cached + S]`.
        fusion: who sees whom.
        cache: keys and values of earlier calls; extended in place.
        attention_backend: a backend of `attend`.
        record: is given each layer's attention weights.

    Returns:
        Hidden states `[B, S, D]` after the final norm.

    Raises:
        ValueError: the map's length is not what cache and embeds make together, or the fusion would have changed
            states that are cached already.
    """
    cached = cache.get_seq_length() if cache is not None else 0
    if len(tokens) != cached + embeds.shape[1] or tokens.shape[0] != embeds.shape[0]:
        raise ValueError(
            f"the TokenMap describes {list(tokens.shape)} tokens, but {cached} are cached and {embeds.shape[1]} are "
            f"given, in {embeds.shape[0]} samples"
        )
    if cached:
        fusion.check_cached(tokens, cached)
    base = decoder.model
    position_ids = tokens.position[:, cached:]
    rotary = _position_embeddings(base, embeds, position_ids)
    changed = fusion.visibility(tokens).rows(cached)
    unchanged = changed if fusion.layers is None else base_visibility(tokens).rows(cached)
    hidden = embeds
    for index, layer in enumerate(base.layers):
        hidden = layer(
            hidden,
            attention_mask=changed if fusion.changes(index) else unchanged,
            position_embeddings=rotary(index),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            attention_backend=attention_backend,
            record=record,
        )
    return base.norm(hidden)


def _position_embeddings(base: PreTrainedModel, embeds: Tensor, position_ids: Tensor) -> Callable[[int], Any]:
    """The rotary embedding of each layer; Gemma 3 has one for each of its layer types, the others one for all."""
    rotary = cast(nn.Module, base.rotary_emb)
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        shared = rotary(embeds, position_ids)
        return lambda _: shared
    types = base.config.layer_types
    by_type = {layer_type: rotary(embeds, position_ids, layer_type) for layer_type in set(types)}
    return lambda index: by_type[types[index]]


def supervised_rows(tokens: TokenMap, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Where the loss is taken: bool `[B, S]` of the tokens whose successor is supervised, and those labels `[n]`.

    The first token of a document is never a target, so packed documents do not predict each other.
    """
    follows = (tokens.document[:, 1:] == tokens.document[:, :-1]) & (tokens.document[:, 1:] >= 0)
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = (labels[:, 1:] != ignored) & follows
    targets = labels[:, 1:][rows[:, :-1]]
    return rows, targets
