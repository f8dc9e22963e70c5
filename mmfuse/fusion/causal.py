"""Causal fusion: media tokens stand in the sequence and everything is read left to right, as in LLaVA.

    columns: S system, I image, Q question, A answer
        S I I Q Q A
      S #
      I # #
      I # # #
      Q # # # #
      Q # # # # #
      A # # # # # #

Paper: Liu et al., Visual Instruction Tuning, arXiv 2304.08485; Improved Baselines, arXiv 2310.03744.
"""

from __future__ import annotations

from mmfuse.fusion.base import Fusion


class Causal(Fusion):
    """Plain causal attention; the base that other strategies are compared with."""
