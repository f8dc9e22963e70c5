"""Masked attention: visibility rules and the backends that run them."""

from mmfuse.kernels.attention import BACKEND_NAMES, BACKENDS, attend
from mmfuse.kernels.visibility import Axis, Condition, Rules, Visibility

__all__ = ["BACKENDS", "BACKEND_NAMES", "Axis", "Condition", "Rules", "Visibility", "attend"]
