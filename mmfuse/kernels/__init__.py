"""Masked attention: visibility rules and the backends that run them."""

from mmfuse.kernels.attention import attend, attend_with_shares, attention_statistics, check_backend
from mmfuse.kernels.call import BackendError, Call
from mmfuse.kernels.classes import Statistics
from mmfuse.kernels.dispatch import BACKEND_NAMES, BACKENDS, choose
from mmfuse.kernels.plan import BlockPlan, plan_blocks
from mmfuse.kernels.rectangles import rectangle_cover
from mmfuse.kernels.visibility import Axis, Condition, Rules, Visibility

__all__ = [
    "BACKENDS",
    "BACKEND_NAMES",
    "Axis",
    "BackendError",
    "BlockPlan",
    "Call",
    "Condition",
    "Rules",
    "Statistics",
    "Visibility",
    "attend",
    "attend_with_shares",
    "attention_statistics",
    "check_backend",
    "choose",
    "plan_blocks",
    "rectangle_cover",
]
