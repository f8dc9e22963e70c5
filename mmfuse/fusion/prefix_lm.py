"""Prefix-LM fusion: media and prompt see each other in both directions up to the first answer, as in PaliGemma.

    columns: S system, I image, Q question, A answer
        S I I Q Q A A
      S # # # # #
      I # # # # #
      I # # # # #
      Q # # # # #
      Q # # # # #
      A # # # # # #
      A # # # # # # #

Paper: Beyer et al., PaliGemma, arXiv 2407.07726, section 3.

Deliberate differences: what follows the first answer of a document (further turns) is causal, because a later question
has read that answer; positions count from 0 where PaliGemma's count from 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.fusion.base import CAUSAL_RULES, CLASSES, Fusion, axis_of
from mmfuse.kernels import Visibility
from mmfuse.sequence import TokenMap


class PrefixLM(Fusion):
    """Bidirectional up to the first answer of each document, causal from there on."""

    shows_future = True

    def visibility(self, tokens: TokenMap) -> Visibility:
        slot = axis_of(tokens).slot
        # All tokens of a prefix share the rank of its first slot, so the causal rule shows them to each other.
        start = _first_in_document(tokens, slot)
        answer = _first_in_document(tokens, torch.where(tokens.is_answer, slot, len(tokens)))
        axis = axis_of(tokens, rank=torch.where(slot < answer, start, slot))
        return Visibility(axis, axis, CAUSAL_RULES, CLASSES)


def _first_in_document(tokens: TokenMap, values: Tensor) -> Tensor:
    """`[B, S]`: the smallest of `values [B, S]` over the token's document, without an S×S tensor."""
    document = tokens.document + 1
    width = int(document.max()) + 1 if document.numel() else 1
    smallest = values.new_full((len(values), width), len(tokens)).scatter_reduce(1, document, values, "amin")
    return smallest.gather(1, document)
