"""What a strategy needs to know of the decoder that it works in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated feed-forward network.
        layers: number of decoder layers.
        heads: query heads.
        kv_heads: key and value heads; fewer than `heads` under grouped-query attention.
        head_dim: width of a head.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From the config of a Hugging Face decoder."""
        heads: int = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
