"""The closed formulas against the figures of the papers, and what strategies make of them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from mmfuse.fusion import FUSIONS, DecoderShape, build_fusion
from mmfuse.fusion.flops import (
    causal_flops,
    cross_attention_flops,
    hyper_attention_flops,
    mlp_flops,
    moda_flops,
    text_stream_flops,
)

VICUNA = DecoderShape(hidden_size=4096, intermediate_size=11008, layers=32, heads=32, kv_heads=32, head_dim=128)
GROUPED = DecoderShape(hidden_size=32, intermediate_size=48, layers=4, heads=4, kv_heads=2, head_dim=16)
VISUAL = 576
#: LLaVA-1.5's projector, which SAISA has in every layer.
PROJECTOR = mlp_flops(1024, 4096, 4096)


def tera(layer: int) -> float:
    """TFLOPs of 32 layers, as tables print them."""
    return round(VICUNA.layers * layer / 1e12, 2)


def test_figures_of_the_papers_at_64_text_tokens() -> None:
    assert tera(causal_flops(VICUNA, 64, VISUAL)) == 8.50
    assert tera(text_stream_flops(VICUNA, 64, VISUAL, projector=PROJECTOR)) == 2.86
    assert tera(VISUAL * PROJECTOR) == 0.77
    assert tera(text_stream_flops(VICUNA, 64, VISUAL, value_output=True, ffn=True)) == 7.69
    assert tera(causal_flops(VICUNA, 64, 0)) == 0.83


def test_flamingo_with_a_block_in_every_layer_and_in_every_fourth() -> None:
    text_only = causal_flops(VICUNA, 64, 0)
    assert tera(text_only + cross_attention_flops(VICUNA, 64, VISUAL, media_width=1024)) == 1.44
    sparse = VICUNA.layers * text_only + VICUNA.layers // 4 * cross_attention_flops(VICUNA, 64, 64, media_width=1024)
    assert round(sparse / 1e12, 2) == 0.97


@pytest.mark.parametrize(("text", "saved"), [(32, 69.8), (64, 66.4), (100, 62.9), (128, 60.4), (256, 51.2)])
def test_what_saisa_saves_falls_with_the_text(text: int, saved: float) -> None:
    ratio = text_stream_flops(VICUNA, text, VISUAL, projector=PROJECTOR) / causal_flops(VICUNA, text, VISUAL)
    assert round(100 * (1 - ratio), 1) == saved


@pytest.mark.parametrize(("visual", "saved"), [(576, 9.5), (2880, 17.7), (4900, 23.3)])
def test_what_ee_mllm_saves_grows_with_the_image(visual: int, saved: float) -> None:
    ratio = text_stream_flops(VICUNA, 64, visual, value_output=True, ffn=True) / causal_flops(VICUNA, 64, visual)
    assert round(100 * (1 - ratio), 1) == saved


def test_grouped_queries_make_keys_and_values_cheaper_and_nothing_else() -> None:
    full = DecoderShape(**{**vars(GROUPED), "kv_heads": 4})
    saved_width = 2 * 2 * GROUPED.head_dim
    for flops in (causal_flops, text_stream_flops):
        assert flops(full, 8, 4) - flops(GROUPED, 8, 4) == 2 * 12 * GROUPED.hidden_size * saved_width
    assert hyper_attention_flops(full, 8, 4) - hyper_attention_flops(GROUPED, 8, 4) == 2 * 4 * 32 * saved_width


def test_alignment_of_media_of_text_and_of_both() -> None:
    base, unit = causal_flops(GROUPED, 8, 4), 2 * 2 * 16**2
    assert moda_flops(GROUPED, 8, 4, directions=("media",)) == base + unit * (8 + 2 * 4)
    assert moda_flops(GROUPED, 8, 4, directions=("text",)) == base + unit * (4 + 2 * 8)
    assert moda_flops(GROUPED, 8, 4, concat=True) == base + unit * (8 + 3 * 4 + 4 + 3 * 8)


def test_shape_of_a_hugging_face_config() -> None:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    assert DecoderShape.of(config) == VICUNA


# Strategies


@pytest.mark.parametrize(
    ("spec", "layer"),
    [
        ("causal", causal_flops(GROUPED, 8, 4)),
        ("prefix_lm", causal_flops(GROUPED, 8, 4)),
        ("mma", causal_flops(GROUPED, 8, 4)),
        ("naavit", text_stream_flops(GROUPED, 8, 4)),
        ({"type": "naavit", "feed_forward": True}, text_stream_flops(GROUPED, 8, 4, ffn=True)),
        ({"type": "naavit", "reading": "text_only"}, causal_flops(GROUPED, 8, 4)),
        ("composite", text_stream_flops(GROUPED, 8, 4, value_output=True, ffn=True)),
        ("moda", moda_flops(GROUPED, 8, 4)),
        ("hyper_attention", causal_flops(GROUPED, 8, 0) + hyper_attention_flops(GROUPED, 8, 4)),
        ("cross_attention", causal_flops(GROUPED, 8, 0) + cross_attention_flops(GROUPED, 8, 4, media_width=32)),
    ],
)
def test_each_strategy_has_its_formula(spec: str | dict[str, Any], layer: int) -> None:
    assert build_fusion(spec).convention_flops(GROUPED, 8, 4) == GROUPED.layers * layer


@pytest.mark.parametrize("name", FUSIONS)
def test_layers_that_a_strategy_leaves_alone_run_its_base(name: str) -> None:
    all_layers, one, none = (build_fusion({"type": name, "layers": layers}) for layers in (None, [2], []))
    changed = all_layers.layer_flops(GROUPED, 8, 4)
    text_only = name in ("cross_attention", "hyper_attention")
    base = causal_flops(GROUPED, 8, 0 if text_only else 4)
    assert one.convention_flops(GROUPED, 8, 4) == changed + 3 * base
    assert none.convention_flops(GROUPED, 8, 4) == 4 * base


def test_cross_attention_in_front_of_every_other_layer() -> None:
    fusion = build_fusion({"type": "cross_attention", "every": 2, "heads": 2, "head_dim": 8, "feed_forward_mult": 1})
    block = cross_attention_flops(GROUPED, 8, 4, media_width=32, inner=16, ff_mult=1)
    assert fusion.convention_flops(GROUPED, 8, 4) == 4 * causal_flops(GROUPED, 8, 0) + 2 * block
