"""Packing chats of an adopted model: what its own processor gives holds one chat a row, and so do its own positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmfuse.fusion import IGNORED_LABEL
from mmfuse.sequence import TokenMap


def packed(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """A batch whose chats `[N, S]` stand behind each other in rows `[R, T]`, without their padding.

    Each is a document of its own and keeps its positions.

    Args:
        batch: `tokens`, `input_ids` and perhaps `labels`; what else it holds stays as it is.
        rows: `[N]`, the row of each chat; they do not decrease, so media stay in reading order.
    """
    tokens: TokenMap = batch["tokens"]
    rows = rows.to(tokens.device)
    live = ~tokens.is_pad
    chat, slot = live.nonzero().T
    lengths = torch.bincount(rows[chat], minlength=int(rows.max()) + 1)
    column = torch.arange(len(chat), device=chat.device) - (lengths.cumsum(0) - lengths)[rows[chat]]
    index = chat.new_full((len(lengths), int(lengths.max())), -1)
    index[rows[chat], column] = chat * live.shape[1] + slot

    def numbered(column: Tensor, counts: Tensor) -> Tensor:
        before = counts.cumsum(0) - counts
        first = torch.searchsorted(rows, rows)  # the first chat of each chat's row
        return torch.where(live, column + (before - before[first]).unsqueeze(1), column)

    segments = tokens.segment.amax(1) + 1
    documents = numbered(tokens.document, torch.ones_like(rows))
    tokens = replace(tokens, document=documents, segment=numbered(tokens.segment, segments))
    tokens = _reshaped(_reshaped(tokens, 1, -1).gather(index.reshape(1, -1)), *index.shape)
    kept = {"input_ids": batch["input_ids"].flatten()[index.clamp(min=0)], "tokens": tokens}
    if batch.get("labels") is not None:
        labels = batch["labels"].flatten()[index.clamp(min=0)]
        kept["labels"] = labels.masked_fill(index < 0, IGNORED_LABEL)
    return {**batch, **kept}


def _reshaped(tokens: TokenMap, rows: int, length: int) -> TokenMap:
    """The slots of a map, counted through all rows, in rows of another length."""
    columns = {name: value for name, value in vars(tokens).items() if value is not None}
    return TokenMap(**{name: value.reshape(rows, length, *value.shape[2:]) for name, value in columns.items()})
