"""Pictures of a run, of what a model attends to, and what a model costs."""

from mmfuse.analysis.attention import (
    AttentionExample,
    AttentionMaps,
    SampleAttention,
    attention_examples,
    attention_to_image,
    visual_grid,
)
from mmfuse.analysis.plots import plot_attention, plot_families, plot_losses, plot_predictions
from mmfuse.analysis.profile import Profile, profile_model, training_flops

__all__ = [
    "AttentionExample",
    "AttentionMaps",
    "Profile",
    "SampleAttention",
    "attention_examples",
    "attention_to_image",
    "plot_attention",
    "plot_families",
    "plot_losses",
    "plot_predictions",
    "profile_model",
    "training_flops",
    "visual_grid",
]
