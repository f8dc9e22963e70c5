"""MODA against its equations, written out sample by sample and head by head, and against the official code's form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfuse.errors import ConfigError
from mmfuse.fusion import ModularDuplexAttention, build_fusion
from mmfuse.fusion.moda import OFFICIAL
from mmfuse.fusion.shape import DecoderShape
from mmfuse.models import MultimodalLM
from mmfuse.models.attention import EnteringCache
from mmfuse.sequence import Modality, Role, TokenMap
from mmfuse.testing import tiny_batch, tiny_model

SHAPE = DecoderShape(hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, head_dim=8)
LAYOUT = [("text", 2), ("image", 3), ("text", 3), ("answer", 2), ("text", 2), ("image", 2), ("text", 1), ("answer", 2)]


def built(**settings: Any) -> ModularDuplexAttention:
    """With random fusers: at their start they hide what is aligned."""
    fusion = build_fusion({"type": "moda", **settings})
    fusion.build(SHAPE, lambda name: torch.nn.Identity(), ("image",))
    for parameter in fusion.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return fusion.double()  # type: ignore[return-value]


def aligned_by_hand(fusion: ModularDuplexAttention, k: Tensor, v: Tensor, tokens: TokenMap, gram: str) -> Tensor:
    """The keys of layer 0, one token after the other, from the paper's equations."""
    out = k.clone()
    for b in range(k.shape[0]):
        facts = list(
            zip(
                tokens.modality[b].tolist(),
                tokens.role[b].tolist(),
                tokens.turn[b].tolist(),
                tokens.document[b].tolist(),
                strict=True,
            )
        )
        for h in range(k.shape[1]):
            unit = [(row + 1e-6) / (row + 1e-6).norm() for row in k[b, h]]
            for i, (modality, role, turn, document) in enumerate(facts):
                media = modality != Modality.TEXT
                if role != Role.PROMPT:
                    continue
                others = [
                    j
                    for j, (m, r, t, d) in enumerate(facts)
                    if (m != Modality.TEXT) != media and r == Role.PROMPT and (t, d) == (turn, document)
                ]
                if not others:
                    continue
                matrix = sum(torch.outer(unit[j], v[b, h, j] if gram == "kv" else unit[j]) for j in others)
                matrix = torch.stack([row / row.norm() for row in matrix])
                fuser = fusion.fusers["0"]["media" if media else "text"]
                aligned = unit[i] @ matrix
                joined = k[b, h, i] + fuser.ratio * aligned if fuser.ratio is not None else None
                out[b, h, i] = fuser.weight @ (torch.cat([k[b, h, i], aligned]) if joined is None else joined)
    return out


@pytest.mark.parametrize("gram", ["kv", "kk"])
@pytest.mark.parametrize("fuse", ["gated_add", "concat"])
@pytest.mark.parametrize("arrangement", ["right", "left", "pack"])
def test_keys_are_aligned_by_the_equations(gram: str, fuse: str, arrangement: str) -> None:
    maps = [TokenMap.from_layout(runs) for runs in (LAYOUT, [("text", 3), ("answer", 1)], LAYOUT[:4], [("image", 2)])]
    tokens = TokenMap.pack(maps) if arrangement == "pack" else TokenMap.batch(maps, side=arrangement)  # type: ignore[arg-type]
    fusion = built(gram=gram, fuse=fuse)
    k, v = torch.randn(2, len(tokens.document), 2, len(tokens), 8, dtype=torch.float64)
    adjusted = fusion.adjust_keys(0, k, v, tokens)
    torch.testing.assert_close(adjusted, aligned_by_hand(fusion, k, v, tokens, gram), rtol=0, atol=1e-12)
    assert torch.equal(
        adjusted.transpose(1, 2)[tokens.is_answer | tokens.is_pad], k.transpose(1, 2)[tokens.is_answer | tokens.is_pad]
    )


def test_official_settings_are_the_official_equations() -> None:
    """K_v <- W(K_v + r * (K̂_v G_t)), G_t the row-normed K̂_tᵀ V_t of *all* text, answers included; nothing else."""
    tokens = TokenMap.from_layout([("text", 3), ("image", 4), ("text", 3), ("answer", 2)])
    fusion = built(**OFFICIAL)
    k, v = torch.randn(2, 1, 2, 12, 8, dtype=torch.float64)
    text, image = [*range(3), *range(7, 12)], list(range(3, 7))
    unit = torch.nn.functional.normalize(k + 1e-6, dim=-1)
    gram = torch.nn.functional.normalize(unit[:, :, text].transpose(-1, -2) @ v[:, :, text], dim=-1)
    fuser = fusion.fusers["0"]["media"]
    expected = k.clone()
    expected[:, :, image] = (k[:, :, image] + fuser.ratio * (unit[:, :, image] @ gram)) @ fuser.weight.T
    torch.testing.assert_close(fusion.adjust_keys(0, k, v, tokens), expected, rtol=0, atol=1e-12)
    assert "text" not in fusion.fusers["0"]
    assert fusion.softmax_mass(tokens) is None


def test_the_official_scope_leaks_and_the_default_does_not() -> None:
    tokens = TokenMap.from_layout(LAYOUT)
    k, v = torch.randn(2, 1, 2, len(tokens), 8, dtype=torch.float64)
    changed = torch.where(tokens.is_answer[:, None, :, None], k + 1.0, k)
    for settings_, leaks in (({}, False), (dict(OFFICIAL), True)):
        fusion = built(**settings_)
        media = tokens.is_media
        before, after = (fusion.adjust_keys(0, keys, v, tokens).transpose(1, 2)[media] for keys in (k, changed))
        assert torch.equal(before, after) is not leaks


def test_the_order_of_text_does_not_matter_to_the_basis() -> None:
    tokens = TokenMap.from_layout([("text", 4), ("image", 3), ("answer", 1)])
    fusion = built()
    k, v = torch.randn(2, 1, 2, 8, 8, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    plain, shuffled = fusion.adjust_keys(0, k, v, tokens), fusion.adjust_keys(0, k[:, :, order], v[:, :, order], tokens)
    torch.testing.assert_close(plain[:, :, 4:7], shuffled[:, :, 4:7], rtol=0, atol=1e-12)


@pytest.mark.parametrize("fuse", ["gated_add", "concat"])
def test_without_mass_a_new_fuser_changes_nothing(fuse: str) -> None:
    model = tiny_model({"type": "moda", "fuse": fuse, "decay_self": None, "decay_cross": None})
    for fusers in model.fusion.fusers.values():
        for fuser in fusers.values():
            fuser.reset_parameters()
    batch = tiny_batch(model)
    assert torch.equal(model(**batch).logits, tiny_model()(**batch).logits)


@settings(max_examples=30)
@given(decay=st.floats(0.05, 3.0), length=st.integers(1, 12))
def test_mass_is_the_sum_of_stablemasks_pseudo_scores(decay: float, length: int) -> None:
    """Scores -(j - 1)β of all masked places j > i, as if the sequence went on without end."""
    fusion = ModularDuplexAttention(decay_self=decay, decay_cross=None)
    mass = fusion.softmax_mass(TokenMap.from_layout([("text", length)]))
    assert mass is not None
    for i in range(1, length + 1):
        expected = sum(math.exp(-(j - 1) * decay) for j in range(i + 1, i + 2000))
        assert math.exp(mass[0, i - 1]) == pytest.approx(expected, rel=1e-4)


def test_mass_has_a_decay_for_text_and_one_for_media_and_starts_anew_in_each_document() -> None:
    tokens = TokenMap.pack([TokenMap.from_layout([("text", 2), ("image", 2)]), TokenMap.from_layout([("text", 3)])])
    both = ModularDuplexAttention(decay_self=0.5, decay_cross=2.0).softmax_mass(tokens)
    text = ModularDuplexAttention(decay_self=0.5, decay_cross=0.5).softmax_mass(tokens)
    assert both is not None and text is not None
    assert torch.equal(both[~tokens.is_media], text[~tokens.is_media])
    assert torch.equal(both[0, 4:], text[0, :3])
    assert (both < text)[tokens.is_media].all()
    none = ModularDuplexAttention(decay_self=0.5, decay_cross=None).softmax_mass(tokens)
    assert none is not None and torch.isinf(none[tokens.is_media]).all()


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_aligned_keys_are_what_the_cache_holds(kv_heads: int) -> None:
    model = tiny_model("moda", kv_heads=kv_heads)
    off = tiny_model("causal", kv_heads=kv_heads)
    batch = {name: value for name, value in tiny_batch(model).items() if name != "labels"}
    cache, plain = (m(**batch, use_cache=True).past_key_values for m in (model, off))
    tokens = batch["tokens"]
    raw = plain.layers[0]
    expected = model.fusion.adjust_keys(0, raw.keys, raw.values, tokens)
    assert torch.equal(cache.layers[0].keys, expected)
    assert (expected - raw.keys).abs().max() > 1e-2
    assert type(cache) is not EnteringCache


def test_a_turn_cannot_be_prefilled_in_parts() -> None:
    model = tiny_model("moda")
    batch = tiny_batch(model, batch=1)
    cache = model(
        batch["input_ids"][:, :7], batch["tokens"].columns(0, 7), batch["pixel_values"], use_cache=True
    ).past_key_values
    with pytest.raises(ValueError, match="sample 0: ModularDuplexAttention lets cached tokens see"):
        model(batch["input_ids"][:, 7:], batch["tokens"], past_key_values=cache)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gram": "vk"}, "unknown gram of moda 'vk'"),
        ({"fuse": "add"}, "unknown fuse of moda 'add'"),
        ({"text_scope": "prefix"}, "unknown text_scope of moda 'prefix'"),
        ({"directions": ["v"]}, "unknown direction of moda 'v'"),
        ({"decay_self": 0.0}, "decays must be positive"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModularDuplexAttention(**wrong)


def test_a_model_with_official_settings_runs() -> None:
    model: MultimodalLM = tiny_model({"type": "moda", **OFFICIAL, "directions": ["media"]})
    assert torch.isfinite(model(**tiny_batch(model)).loss)
