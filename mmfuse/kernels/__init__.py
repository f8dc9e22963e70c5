"""Masked attention: visibility rules and the backends that run them."""

from mmfuse.kernels.attention import BACKENDS, attend
from mmfuse.kernels.visibility import Axis, Condition, Rules, Visibility

__all__ = ["BACKENDS", "Axis", "Condition", "Rules", "Visibility", "attend"]
