"""Our loop over the layers of an unmodified Hugging Face decoder.

The layers are called as their own model calls them, with a `Request` where Hugging Face passes its mask. So PEFT wraps
the projections, caches work, and gradient checkpointing is the layers' own. `MediaPath` says what the layers see of
media: this file runs them as rows; `text_stream` and `aside` are the other two ways.

Shapes: `B` samples, `S` tokens of this call, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig

from mmfuse.fusion.base import Fusion, MediaPath, base_visibility
from mmfuse.kernels import attend
from mmfuse.models.aside import AsideCache, AsideLayers
from mmfuse.models.attention import AttentionFunction, Enter, Recorder, Request
from mmfuse.models.layer_parts import PARTS, LayerParts
from mmfuse.models.passes import Pass
from mmfuse.models.text_stream import TextStream
from mmfuse.sequence import TokenMap


def run_decoder(
    decoder: Any,
    embeds: Tensor,
    tokens: TokenMap,
    fusion: Fusion,
    *,
    features: Mapping[str, Tensor] | None = None,
    arrange: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    cache: Cache | None = None,
    attention_backend: str = "auto",
    attention: AttentionFunction = attend,
    record: Recorder | None = None,
) -> Tensor:
    """Run the decoder's layers and final norm.

    Args:
        decoder: a Hugging Face causal LM built with `attn_implementation="mmfuse"`, or what holds its `model` and
            `config`.
        embeds: `[B, S, D]`, the tokens that are new in this call, media as their connectors made them.
        tokens: the map of all tokens, cached ones first: `[B, cached + S]`.
        fusion: who sees whom, and how media go through the layers.
        features: for each modality what its encoder gave for the new media, `[N, V, De]`.
        arrange: for each modality whose connector does not give tokens in reading order, see `MediaSource`.
        cache: keys and values of earlier calls, made by `new_cache`; extended in place.
        attention_backend: a backend of `attend`.
        attention: stands in for `attend`, as the profiler's does, which counts.
        record: is given each layer's attention weights.

    Returns:
        Hidden states `[B, S, D]` after the final norm; rows that the strategy does not compute are 0.

    Raises:
        ValueError: the map's length is not what cache and embeds make together, or the fusion would have changed
            states that are cached already.
        TypeError: the cache is none for this strategy.
    """
    cached = cache.get_seq_length() if cache is not None else 0
    if len(tokens) != cached + embeds.shape[1] or tokens.shape[0] != embeds.shape[0]:
        raise ValueError(
            f"the TokenMap describes {list(tokens.shape)} tokens, but {cached} are cached and {embeds.shape[1]} are "
            f"given, in {embeds.shape[0]} samples"
        )
    if cached:
        fusion.check_cached(tokens, cached)
    parts = PARTS[decoder.config.model_type]
    attention = partial(attention, backend=attention_backend)
    media = dict(features or {}), dict(arrange or {})
    run = Pass(decoder.model, embeds, tokens, cached, fusion, cache, attention, record, *media)
    if fusion.media_path is MediaPath.ASIDE:
        return AsideLayers(run, parts)()
    return _run_in_sequence(run, parts)


def new_cache(fusion: Fusion, config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a decoder of this `config` under `fusion`."""
    return AsideCache(config=config) if fusion.media_path is MediaPath.ASIDE else DynamicCache(config=config)


def _run_in_sequence(run: Pass, parts: type[LayerParts]) -> Tensor:
    """Media are rows of each layer, or give it keys and values."""
    as_keys = run.fusion.media_path is MediaPath.KEYS and run.fusion.layers != ()
    stream = TextStream(run, parts) if as_keys and bool(run.new.is_media.any()) else None
    hidden = _touched(run) if as_keys and stream is None else run.embeds
    rows = _Rows(run)
    apart: tuple[Tensor, Tensor] | None = None
    for index, layer in enumerate(run.layers):
        if stream is not None and run.fusion.changes(index):
            text, media = stream.split(hidden) if apart is None else apart
            apart = stream.layer(index, layer, text, media)
        else:
            if stream is not None and apart is not None:
                hidden, apart = stream.join(*apart), None
            hidden = run.call(layer, hidden, rows.rotary(index), rows.positions, rows.request(index))
    if stream is not None and apart is not None:
        return stream.join(run.norm(apart[0]))
    return run.norm(hidden)


class _Rows:
    """Requests of the layers in which all tokens are rows."""

    def __init__(self, run: Pass) -> None:
        self._run = run
        fusion, tokens = run.fusion, run.tokens
        self._changed = fusion.visibility(tokens).rows(run.cached)
        self._unchanged = self._changed if fusion.layers is None else base_visibility(tokens).rows(run.cached)
        mass = fusion.softmax_mass(tokens)
        self._mass = None if mass is None else mass[:, run.cached :]
        self.positions = run.new.position
        self.rotary = run.rotary(self.positions, run.new.grid)

    def request(self, index: int) -> Request:
        run = self._run
        if not run.fusion.changes(index):
            return Request(self._unchanged, run.attention, run.record)
        enter = self._enter(index) if run.fusion.adjusts_keys else None
        return Request(self._changed, run.attention, run.record, enter, self._mass)

    def _enter(self, index: int) -> Enter:
        fusion, tokens = self._run.fusion, self._run.new
        return lambda k, v: (fusion.adjust_keys(index, k, v, tokens), v)


def _touched(run: Pass) -> Tensor:
    """The embeddings; a batch without media still uses a strategy's projectors, so that ranks do not diverge."""
    embeds = run.embeds
    if run.features and torch.is_grad_enabled():
        nothing = torch.full((embeds.shape[0], 0), -1, device=embeds.device)
        source, state = run.source(nothing), embeds[:, :0]
        for index in range(len(run.layers)):
            if run.fusion.changes(index):
                embeds = embeds + 0.0 * run.fusion.media_state(index, state, source).sum()
    return embeds


def supervised_rows(tokens: TokenMap, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Where the loss is taken: bool `[B, S]` of the tokens whose successor is supervised, and those labels `[n]`.

    The first token of a document is never a target, so packed documents do not predict each other.
    """
    follows = (tokens.document[:, 1:] == tokens.document[:, :-1]) & (tokens.document[:, 1:] >= 0)
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = (labels[:, 1:] != ignored) & follows
    targets = labels[:, 1:][rows[:, :-1]]
    return rows, targets
