"""Media blocks: causal attention in which the tokens of one medium see each other, as in Gemma 3.

    columns: S system, I image, Q question, A answer
        S I I Q Q A A
      S #
      I # # #
      I # # #
      Q # # # #
      Q # # # # #
      A # # # # # #
      A # # # # # # #

Paper: Gemma 3 Technical Report, arXiv 2503.19786, after the implementation in transformers: an image never sees an
image or text behind it.

Deliberate difference: in a layer with a sliding window, a token sees neither back nor ahead further than the window;
in transformers the window does not limit the view ahead. They agree wherever a medium is no longer than the window.
"""

from __future__ import annotations

from torch import Tensor

from mmfuse.fusion.base import CAUSAL_RULES, CLASSES, MEDIA, Fusion, axis_of
from mmfuse.kernels import Condition, Rules, Visibility
from mmfuse.sequence import TokenMap

BLOCK_RULES: Rules = {**CAUSAL_RULES, (MEDIA, MEDIA): (Condition.CAUSAL, Condition.SAME_SEGMENT)}


class MediaBlocks(Fusion):
    """Causal attention in which a medium's tokens see their whole medium."""

    shows_future = True

    def visibility(self, tokens: TokenMap) -> Visibility:
        axis = axis_of(tokens)
        return Visibility(axis, axis, BLOCK_RULES, CLASSES)

    def check_labels(self, tokens: TokenMap, labels: Tensor) -> None:
        """Any text may be supervised: media look ahead at media alone."""
