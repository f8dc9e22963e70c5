"""The forms in which texts are compared, one for each convention, and what can be read from an answer."""

from mmfuse.eval.text.plain import normalise

__all__ = ["normalise"]
