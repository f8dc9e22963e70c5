"""Pictures of a run and of what a model attends to."""

from mmfuse.analysis.attention import (
    AttentionExample,
    AttentionMaps,
    SampleAttention,
    attention_examples,
    attention_to_image,
    visual_grid,
)
from mmfuse.analysis.plots import plot_attention, plot_families, plot_losses, plot_predictions

__all__ = [
    "AttentionExample",
    "AttentionMaps",
    "SampleAttention",
    "attention_examples",
    "attention_to_image",
    "plot_attention",
    "plot_families",
    "plot_losses",
    "plot_predictions",
    "visual_grid",
]
