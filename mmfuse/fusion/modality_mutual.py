"""Modality-mutual attention (AKI): the image may look ahead at the question that is asked about it.

    columns: S system, I image, Q question up to and including the answer header, A answer
        S I I Q Q A A
      S #
      I # #   # #
      I # # # # #
      Q # # # #
      Q # # # # #
      A # # # # # #
      A # # # # # # #

Paper: Wu et al., Making Multimodal LLMs attend both ways (AKI), arXiv 2503.02597, eq. of the mask M':
M'_ij = 0 if j <= i, or i is an image token and j a question token; minus infinity otherwise.

Image to image stays causal, as in the paper. A medium never looks ahead at an answer, and only at the prompt text of
its own turn: the question of a later turn has read the earlier answer, so seeing it would hand that answer to the
tokens that should predict it. A sample without an instruction (captioning) is therefore plain causal.

Deliberate differences from the official code: any number of media of any modality, batches, packing, and padding on
either side (it takes one image and one sample in generation); the prompt is known by role and not by a token id.
"""

from __future__ import annotations

from mmfuse.fusion.base import CAUSAL_RULES, CLASSES, MEDIA, PROMPT, Fusion, axis_of
from mmfuse.kernels import Condition, Rules, Visibility
from mmfuse.sequence import TokenMap

MUTUAL_RULES: Rules = {**CAUSAL_RULES, (MEDIA, PROMPT): (Condition.CAUSAL, Condition.SAME_TURN)}


class ModalityMutual(Fusion):
    """Causal attention in which media also see all prompt text of their own turn."""

    shows_future = True

    def visibility(self, tokens: TokenMap) -> Visibility:
        axis = axis_of(tokens)
        return Visibility(axis, axis, MUTUAL_RULES, CLASSES)
