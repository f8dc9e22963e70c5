"""The forms in which texts are compared, one for each convention, and what can be read from an answer."""

from mmfuse.eval.text.edits import edit_distance
from mmfuse.eval.text.plain import normalise
from mmfuse.eval.text.vqa import evalai, vqa_lmms, vqa_official, vqa_vlmevalkit

__all__ = ["edit_distance", "evalai", "normalise", "vqa_lmms", "vqa_official", "vqa_vlmevalkit"]
