"""The pictures of a run: curves, scores, answers, attention, and the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmfuse.analysis.attention import attention_examples, visual_grid
from mmfuse.analysis.plots import plot_attention, plot_families, plot_losses, plot_predictions
from mmfuse.data import Source, encode_sample
from mmfuse.eval.questions import Prediction
from mmfuse.eval.report import Picture
from mmfuse.sequence import TokenMap
from mmfuse.training.module import MultimodalModule

FOLDER = "plots"


def training_pictures(folder: Path, module: MultimodalModule) -> list[Picture]:
    """Write the curves of a run into `folder/plots`; none for a run that logged no step."""
    metrics, path = folder / "metrics.csv", folder / FOLDER / "losses.png"
    if not metrics.exists():
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_losses(metrics, path, stages=module.schedule.starts_by_name())
    caption = "Loss on answer tokens, exact match on validation questions under teacher forcing, learning rates."
    return [Picture("Training", caption, path)]


def answer_pictures(
    folder: Path,
    module: MultimodalModule,
    source: Source,
    seen: Sequence[Prediction],
    blind: Sequence[Prediction],
    scores: Mapping[str, Any],
) -> list[Picture]:
    """Write the pictures of held-out answers into `folder/plots`.

    Args:
        folder: the run folder.
        module: the model that was tested.
        source: the questions, in the order of `seen`.
        seen: answers with the image.
        blind: answers without it.
        scores: what `mmfuse.eval.scores.score` gives.
    """
    plots = folder / FOLDER
    plots.mkdir(parents=True, exist_ok=True)
    fusion = type(module.network.fusion).__name__
    pictures = []
    plot_families(scores, plots / "families.png")
    caption = "Exact match with its 95 % interval, the same model without the image, and the most frequent answer."
    pictures.append(Picture("Scores by question family", caption, plots / "families.png"))
    chosen = _examples(seen, count=12)
    samples = [source[number] for number in chosen]
    plot_predictions(samples, [seen[n] for n in chosen], plots / "predictions.png", blind=[blind[n] for n in chosen])
    caption = "Held-out questions: what was expected, what was answered, and the answer without the image in grey."
    pictures.append(Picture("Answers", caption, plots / "predictions.png"))
    shown = _one_per_family(seen)
    with_image = [number for number in shown if source[number].pictures]
    if with_image:
        # Something to ask `mmfuse generate` about.
        image = source[with_image[0]].pictures[0]
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(plots / "example.png")
    if with_image and _has_grid(module):
        examples = attention_examples(
            module.network,
            module.processor,
            [source[number] for number in with_image],
            answers=[seen[number].prediction or seen[number].answer for number in with_image],
        )
        plot_attention(examples, plots / "attention.png")
        caption = "What the row that predicts each answer token attends to in the image, averaged over heads."
        pictures.append(Picture("Attention to the image", caption, plots / "attention.png"))
    encoded = encode_sample(source[shown[0]], module.processor.encoder)
    tokens = _tokens(module, module.processor.collate([encoded]))
    module.network.fusion.visibility(tokens).plot(plots / "mask.png")
    caption = f"Who attends to whom in one held-out question under {fusion}: rows see columns."
    pictures.append(Picture("Mask", caption, plots / "mask.png"))
    return pictures


def _tokens(module: MultimodalModule, batch: Mapping[str, Any]) -> TokenMap:
    """The map of a batch, on the CPU."""
    inputs = {name: value.to(module.device) for name, value in batch.items()}
    with torch.no_grad():
        tokens: TokenMap = module.network.prepared(inputs)["tokens"]
    return tokens.to("cpu")


def _has_grid(module: MultimodalModule) -> bool:
    """Whether visual tokens have a place in the image; those of a resampler have none."""
    try:
        visual_grid(module.network)
    except ValueError:
        return False
    return True


def _one_per_family(predictions: Sequence[Prediction], most: int = 7) -> list[int]:
    """The number of the first right answer of each family, or of its first."""
    first: dict[str, int] = {}
    for number, prediction in enumerate(predictions):
        held = first.get(prediction.family)
        if held is None or (prediction.right and not predictions[held].right):
            first[prediction.family] = number
    return list(first.values())[:most]


def _examples(predictions: Sequence[Prediction], count: int) -> list[int]:
    """Numbers of some answers: up to a third wrong ones, which teach most, the rest right, families in turn."""
    by_family: dict[tuple[bool, str], list[int]] = {}
    for number, prediction in enumerate(predictions):
        by_family.setdefault((prediction.right, prediction.family), []).append(number)
    wrong = _in_turn([held for (right, _), held in by_family.items() if not right])[: count // 3]
    right = _in_turn([held for (right, _), held in by_family.items() if right])[: count - len(wrong)]
    return sorted(right + wrong)


def _in_turn(groups: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)]
