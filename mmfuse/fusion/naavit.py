"""No attention from visual tokens (NAAViT, NAEViT): text reads media, and media read nothing.

    columns: S system, I image, Q question, A answer
        S I I Q Q A
      S #
      I
      I
      Q # # # #
      Q # # # # #
      A # # # # # #

Papers: SAISA, arXiv 2502.02458, section 3 (the pilot study); ShortV, arXiv 2504.00502, for its frozen layers. The
pilot study does not say what a visual token without attention becomes, so three readings are offered:

- `no_query` (the default): a media token issues no query and its state is carried through the layer unchanged. With
  `layers=[…]` these are ShortV's frozen layers. With `feed_forward=True` it still passes the feed-forward network.
- `self_only`: it sees itself alone and passes the feed-forward network, as in EE-MLLM.
- `text_only`: it issues queries and sees the text before it, but no media, not even itself.

Deliberate differences from the official code of ShortV: any number of media of any modality, batches, packing and
padding (it has 35 tokens before one image); media rows are 0 behind a frozen last layer (there they are their normed
state).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Literal

from mmfuse.errors import ConfigError, unknown
from mmfuse.fusion.base import CAUSAL_RULES, CLASSES, MEDIA, TEXT_ROWS, Fusion, MediaPath, MediaUpdate, axis_of
from mmfuse.kernels import Condition, Rules, Visibility
from mmfuse.sequence import TokenMap

Reading = Literal["no_query", "self_only", "text_only"]

READINGS = MappingProxyType[str, Rules](
    {
        "no_query": TEXT_ROWS,
        "self_only": {**TEXT_ROWS, (MEDIA, MEDIA): (Condition.SELF,)},
        "text_only": {pair: rule for pair, rule in CAUSAL_RULES.items() if pair != (MEDIA, MEDIA)},
    }
)


class NAAViT(Fusion):
    """Media are read by text and do not read each other.

    Args:
        layers: see `Fusion`.
        reading: what a media token is in such a layer, see above.
        feed_forward: under `no_query`, whether it still passes the feed-forward network.

    Raises:
        ConfigError: an unknown reading, or `feed_forward` with another one than `no_query`.
    """

    def __init__(
        self, layers: Sequence[int] | None = None, reading: Reading = "no_query", feed_forward: bool = False
    ) -> None:
        super().__init__(layers)
        if reading not in READINGS:
            raise ConfigError(unknown("reading of naavit", reading, READINGS))
        if feed_forward and reading != "no_query":
            raise ConfigError(f"naavit: feed_forward belongs to reading 'no_query', not to {reading!r}")
        self.reading = reading
        self.media_path = MediaPath.ROWS if reading == "text_only" else MediaPath.KEYS
        self.media_update = MediaUpdate(reading == "self_only", reading == "self_only" or feed_forward)

    def visibility(self, tokens: TokenMap) -> Visibility:
        axis = axis_of(tokens)
        return Visibility(axis, axis, READINGS[self.reading], CLASSES)
