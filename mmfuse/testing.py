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
from mmfuse.fusion.base import base_visibility
from mmfuse.kernels import BACKENDS, Call
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
#: Ids of text are drawn below this; the placeholders of further modalities stand behind it.
VOCABULARY = 64
MEDIA_TOKEN_IDS = {"image": IMAGE_TOKEN_ID, "audio": VOCABULARY, "eeg": VOCABULARY + 1}

Layout = Sequence[tuple[str, int]]
DEFAULT_LAYOUT: Layout = (("text", 3), ("image", 4), ("text", 4), ("answer", 3))


def backends_here() -> list[str]:
    """The attention backends that can run on this machine's CPU; `triton` only in the interpreter."""
    visibility = base_visibility(TokenMap.from_layout([("text", 1)]))
    return [name for name, each in BACKENDS.items() if each.refusal(visibility, Call(heads=1, width=16)) is None]


def tiny_model(
    fusion: str | Mapping[str, Any] = "causal",
    family: str = "llama",
    *,
    kv_heads: int = 2,
    modalities: Sequence[str] = ("image",),
    seed: int = 0,
    **overrides: Any,
) -> MultimodalLM:
    """A random two-layer model in evaluation mode: 16×16 images in 4 visual tokens, hidden size 32, 4 heads.

    Modalities other than images come as precomputed features `[N, 3, 12]`, in 3 tokens each.

    Args:
        fusion: a strategy by name or spec.
        family: a decoder family, see `FAMILIES`.
        kv_heads: 4 gives multi-head attention, 2 and 1 grouped-query attention.
        modalities: of the media that the model takes.
        seed: of the weights; the caller's random state is left alone.
        **overrides: fields of the decoder's config.
    """
    if family not in FAMILIES:
        raise ValueError(unknown("decoder family", family, FAMILIES))
    for modality in modalities:
        if modality not in MEDIA_TOKEN_IDS:
            raise ValueError(unknown("modality", modality, MEDIA_TOKEN_IDS))
    token_ids = {modality: MEDIA_TOKEN_IDS[modality] for modality in modalities}
    text_config = {
        "model_type": family,
        "vocab_size": max([VOCABULARY, *(token_id + 1 for token_id in token_ids.values())]),
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
    features = {"type": "precomputed", "hidden_size": 12, "num_tokens": 3}
    config = MultimodalConfig(
        text_config=text_config,
        encoders={name: {"type": "hf", "config": vision} if name == "image" else features for name in modalities},
        connectors={name: {"type": "linear"} for name in modalities},
        fusion=fusion,
        media_token_ids=token_ids,
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
        model: gives the number of tokens of a medium; runs of `image` must hold whole images, and so on.
        layout: runs of one sample, see `TokenMap.from_layout`, or a list of samples.
        batch: how often one layout is repeated, with different contents.
        side: where shorter samples are padded.
        pack: put the samples behind each other in one row instead of batching them.
        seed: of the contents.

    Returns:
        `input_ids [B, S]`, `tokens`, `labels [B, S]` (answers only), and the media that there are by the model's own
        keywords: `pixel_values [N, 3, H, W]`, `audio_features [N, V, D]`.

    Raises:
        ValueError: a run of media that the model does not take, or that is no multiple of a medium's tokens.
    """
    layouts = _layouts(layout, batch)
    maps = [TokenMap.from_layout(runs) for runs in layouts]
    tokens = TokenMap.pack(maps) if pack else TokenMap.batch(maps, side=side)
    generator = torch.Generator().manual_seed(seed)
    # Contents are drawn sample by sample, so that a batch, a pack and single samples hold the same ones.
    contents = [torch.randint(4, VOCABULARY, (len(sample),), generator=generator) for sample in maps]
    media: dict[str, list[Tensor]] = {}
    for kind, length in (run for runs in layouts for run in runs):
        if kind not in ("text", "answer"):
            media.setdefault(kind, []).extend(_random_media(model, kind, length, generator))
    ids = torch.zeros(tokens.shape, dtype=torch.long)
    ids[~tokens.is_pad] = torch.cat(contents)
    for kind in media:
        ids = torch.where(tokens.modality == Modality[kind.upper()], MEDIA_TOKEN_IDS[kind], ids)
    made: dict[str, Tensor | TokenMap] = {
        "input_ids": ids,
        "tokens": tokens,
        "labels": torch.where(tokens.is_answer, ids, IGNORED_LABEL),
    }
    return made | {model.input_names[kind]: torch.stack(inputs) for kind, inputs in media.items() if inputs}


def _random_media(model: MultimodalLM, kind: str, length: int, generator: torch.Generator) -> list[Tensor]:
    """Inputs for a run of `length` tokens."""
    if kind not in model.input_names:
        raise ValueError(unknown("modality of the model", kind, model.input_names))
    each = model.visual_tokens(kind)
    if length % each:
        raise ValueError(f"a run of {length} {kind} tokens is no multiple of {each}, the tokens of one {kind}")
    shape = cast(Encoder, model.encoders[kind]).input_shape
    return [torch.randn(*shape, generator=generator) for _ in range(length // each)]


def _layouts(layout: Layout | Sequence[Layout] | None, batch: int) -> list[Layout]:
    if layout is None:
        return [DEFAULT_LAYOUT] * batch
    if layout and isinstance(layout[0][0], str):
        return [layout] * batch  # type: ignore[list-item]
    return list(layout)  # type: ignore[arg-type]
