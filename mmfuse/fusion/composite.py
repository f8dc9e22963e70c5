"""Composite attention (EE-MLLM): text reads media, and media are updated by the layer's own weights without attention.

    columns: S system, I image, Q question, A answer
        S I I Q Q A
      S #
      I   #
      I     #
      Q # # # #
      Q # # # # #
      A # # # # # #

Paper: Ma et al., EE-MLLM, arXiv 2408.11795. Queries come from text alone, keys and values from media and text. The
aligner is free of parameters: media pass the value and output projections and the feed-forward network of the same
layer, `v + O(V(LN v))`, then `v + FFN(LN v)`. That is what attention to itself alone is, so the strategy equals an
unmodified decoder with a mask whose media rows are diagonal, and it loads any checkpoint.

There is no official code. Which of the layer's weights the aligner reuses is deduced from the paper's ablation; media
keep their ordinary positions.
"""

from __future__ import annotations

from mmfuse.fusion.base import CLASSES, MEDIA, TEXT_ROWS, Fusion, MediaPath, MediaUpdate, axis_of
from mmfuse.kernels import Condition, Rules, Visibility
from mmfuse.sequence import TokenMap

COMPOSITE_RULES: Rules = {**TEXT_ROWS, (MEDIA, MEDIA): (Condition.SELF,)}


class CompositeAttention(Fusion):
    """Text reads media; a media token sees itself alone."""

    media_path = MediaPath.KEYS
    media_update = MediaUpdate(value_output=True, feed_forward=True)

    def visibility(self, tokens: TokenMap) -> Visibility:
        axis = axis_of(tokens)
        return Visibility(axis, axis, COMPOSITE_RULES, CLASSES)
