"""Random offline models and batches in one line, for tests and for authors of new strategies.

    model = tiny_model(fusion="mma", family="qwen3")
    batch = tiny_batch(model, [("text", 3), ("image", 4), ("text", 5), ("answer", 2)])
    logits = model(**batch).logits

Weights are drawn with a standard deviation of 0.2: with the usual 0.02 a tiny random model hardly reacts to its mask,
and tests of a mask would pass whatever it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mmfuse.errors import unknown
from mmfuse.fusion import IGNORED_LABEL
from mmfuse.models.config import MultimodalConfig
from mmfuse.models.encoders import Encoder
from mmfuse.models.modeling import MultimodalLM
from mmfuse.sequence import Modality, Side, TokenMap

#: What differs between the families; sliding windows are short, so that tests can run past them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "phi3": {"sliding_window": 6},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}

IMAGE_TOKEN_ID = 3
VOCABULARY = 64

Layout = Sequence[tuple[str, int]]
DEFAULT_LAYOUT: Layout = (("text", 3), ("image", 4), ("text", 4), ("answer", 3))


def tiny_model(
    fusion: str | Mapping[str, Any] = "causal",
    family: str = "llama",
    *,
    kv_heads: int = 2,
    seed: int = 0,
    **overrides: Any,
) -> MultimodalLM:
    """A random two-layer model in evaluation mode: 16×16 images in 4 visual tokens, hidden size 32, 4 heads.

    Args:
        fusion: a strategy by name or spec.
        family: a decoder family, see `FAMILIES`.
        kv_heads: 4 gives multi-head attention, 2 and 1 grouped-query attention.
        seed: of the weights; the caller's random state is left alone.
        **overrides: fields of the decoder's config.
    """
    if family not in FAMILIES:
        raise ValueError(unknown("decoder family", family, FAMILIES))
    text_config = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **FAMILIES[family],
        **overrides,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = MultimodalConfig(
        text_config=text_config,
        encoders={"image": {"type": "hf", "config": vision}},
        connectors={"image": {"type": "linear"}},
        fusion=fusion,
        media_token_ids={"image": IMAGE_TOKEN_ID},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MultimodalLM(config).eval()
        for parameter in model.fusion.parameters():
            # Gates that start at 0 and copies of one connector would hide what the strategy does.
            parameter.data += 0.2 * torch.randn_like(parameter)
        return model


def tiny_batch(
    model: MultimodalLM,
    layout: Layout | Sequence[Layout] | None = None,
    batch: int = 2,
    *,
    side: Side = "right",
    pack: bool = False,
    seed: int = 0,
) -> dict[str, Tensor | TokenMap]:
    """A random batch for `model(**batch)`.

    Args:
        model: gives the number of visual tokens of an image; runs of `image` must hold whole images.
        layout: runs of one sample, see `TokenMap.from_layout`, or a list of samples.
        batch: how often one layout is repeated, with different contents.
        side: where shorter samples are padded.
        pack: put the samples behind each other in one row instead of batching them.
        seed: of the contents.

    Returns:
        `input_ids [B, S]`, `tokens`, `labels [B, S]` (answers only), and `pixel_values [N, 3, H, W]` if there are
        images.

    Raises:
        ValueError: a run of images that is no multiple of the model's visual tokens.
    """
    layouts = _layouts(layout, batch)
    maps = [TokenMap.from_layout(runs) for runs in layouts]
    tokens = TokenMap.pack(maps) if pack else TokenMap.batch(maps, side=side)
    generator = torch.Generator().manual_seed(seed)
    # Contents are drawn sample by sample, so that a batch, a pack and single samples hold the same ones.
    contents = [torch.randint(4, VOCABULARY, (len(sample),), generator=generator) for sample in maps]
    per_image = model.visual_tokens("image")
    images = []
    for runs in layouts:
        for kind, length in runs:
            if kind == "image":
                if length % per_image:
                    raise ValueError(
                        f"a run of {length} image tokens is no multiple of {per_image}, the tokens of one image"
                    )
                size = cast(Encoder, model.encoders["image"]).image_size
                images += [torch.randn(3, *size, generator=generator) for _ in range(length // per_image)]
    ids = torch.zeros(tokens.shape, dtype=torch.long)
    ids[~tokens.is_pad] = torch.cat(contents)
    ids = torch.where(tokens.modality == Modality.IMAGE, IMAGE_TOKEN_ID, ids)
    made: dict[str, Tensor | TokenMap] = {
        "input_ids": ids,
        "tokens": tokens,
        "labels": torch.where(tokens.is_answer, ids, IGNORED_LABEL),
    }
    if images:
        made["pixel_values"] = torch.stack(images)
    return made


def _layouts(layout: Layout | Sequence[Layout] | None, batch: int) -> list[Layout]:
    if layout is None:
        return [DEFAULT_LAYOUT] * batch
    if layout and isinstance(layout[0][0], str):
        return [layout] * batch  # type: ignore[list-item]
    return list(layout)  # type: ignore[arg-type]
