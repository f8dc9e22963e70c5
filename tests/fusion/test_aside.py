"""Cross-attention and hyper attention: against their equations written out, the cache beside the text, and beams."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mmfuse.errors import ConfigError
from mmfuse.fusion import GatedCrossAttention, HyperAttention
from mmfuse.fusion.aside import latest_segment
from mmfuse.models import MultimodalLM
from mmfuse.models.aside import AsideCache
from mmfuse.models.layer_parts import rotate
from mmfuse.sequence import Modality, TokenMap
from mmfuse.testing import FAMILIES, tiny_batch, tiny_model

LAYOUT = [("text", 2), ("image", 4), ("text", 2), ("image", 4), ("text", 3), ("answer", 3)]
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def media_of(model: MultimodalLM, batch: dict[str, Any]) -> Tensor:
    return model.connectors["image"](model.encoders["image"](batch["pixel_values"])).reshape(-1, 8, 32)


def text_map(length: int) -> TokenMap:
    return TokenMap.batch([TokenMap.from_layout([("text", length)])] * 2)


def block_by_hand(block: Any, hidden: Tensor, media: Tensor, seen: Tensor) -> Tensor:
    """OpenFlamingo's gated block; `seen [T, M]` says which media a row of text looks at, none gives 0."""
    q = block.to_q(block.norm(hidden)).unflatten(-1, (block.heads, -1))
    k, v = (half.unflatten(-1, (block.heads, -1)) for half in block.to_kv(media).chunk(2, -1))
    scores = torch.einsum("bthd,bmhd->bhtm", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen.any(-1, keepdim=True)
    out = torch.einsum("bhtm,bmhd->bthd", weights, v).flatten(2)
    hidden = hidden + block.attention_gate.tanh() * block.to_out(out)
    return hidden + block.feed_forward_gate.tanh() * block.feed_forward(hidden)


@torch.no_grad()
@pytest.mark.parametrize("reach", ["latest", "all"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_cross_attention_is_the_text_decoder_with_blocks_between(family: str, every: int, reach: str) -> None:
    model = tiny_model({"type": "cross_attention", "reach": reach, "every": every, "heads": 2}, family)
    batch = tiny_batch(model, LAYOUT)
    media, text = media_of(model, batch), ~batch["tokens"].is_media
    seen = torch.zeros(10, 8, dtype=torch.bool)
    seen[2:4, :4] = seen[4:, 4:] = True
    if reach == "all":
        seen[4:, :4] = True
    base = tiny_model("causal", family)
    base.decoder.load_state_dict(model.decoder.state_dict())
    for index, layer in enumerate(base.decoder.model.layers):
        if (index + 1) % every == 0:
            block = model.fusion.blocks[str(index)]
            layer.register_forward_pre_hook(
                lambda _, args, block=block: (block_by_hand(block, args[0], media, seen), *args[1:])
            )
    assert len(model.fusion.blocks) == 2 // every
    expected = base(batch["input_ids"][text].reshape(2, 10), text_map(10)).logits
    torch.testing.assert_close(model(**batch).logits[text].reshape(2, 10, -1), expected, **CLOSE)


@torch.no_grad()
def test_closed_gates_are_the_text_only_decoder() -> None:
    model = tiny_model("cross_attention")
    for block in model.fusion.blocks.values():
        block.reset_parameters()
    batch = tiny_batch(model, LAYOUT)
    text = ~batch["tokens"].is_media
    expected = tiny_model()(batch["input_ids"][text].reshape(2, 10), text_map(10)).logits
    assert torch.equal(model(**batch).logits[text].reshape(2, 10, -1), expected)


@torch.no_grad()
def test_hyper_attention_is_one_softmax_over_media_and_text() -> None:
    model = tiny_model({"type": "hyper_attention", "layers": [1]})
    batch = tiny_batch(model, LAYOUT)
    media, text = media_of(model, batch), ~batch["tokens"].is_media
    base = model.decoder.model
    ids = batch["input_ids"][text].reshape(2, 10)
    order = torch.arange(10).expand(2, -1)
    # Both media stand where their place in the text is: behind 2 and behind 4 tokens.
    places = torch.tensor([2] * 4 + [4] * 4).expand(2, -1)
    captured: list[Tensor] = []
    causal = tiny_model()
    causal.decoder.load_state_dict(model.decoder.state_dict())
    causal.decoder.model.layers[0].register_forward_hook(lambda _, __, out: captured.append(out))
    causal(ids, text_map(10))
    hidden, layer = captured[0], base.layers[1]
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        p(normed).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    rotary = base.rotary_emb(hidden, order)
    media_k, media_v = (
        half.unflatten(-1, (-1, 8)).transpose(1, 2)
        for half in model.fusion.projections["1"](layer.input_layernorm(media)).chunk(2, -1)
    )
    keys = torch.cat([rotate(media_k, base.rotary_emb(media, places)), rotate(k, rotary)], 2).repeat_interleave(2, 1)
    values = torch.cat([media_v, v], 2).repeat_interleave(2, 1)
    scores = rotate(q, rotary) @ keys.transpose(-1, -2) / 8**0.5
    seen = torch.cat([order[0, :, None] >= places[0], torch.ones(10, 10, dtype=torch.bool).tril()], dim=1)
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
    hidden = base.norm(hidden + layer.mlp(layer.post_attention_layernorm(hidden)))
    expected = model.decoder.lm_head(hidden)
    torch.testing.assert_close(model(**batch).logits[text].reshape(2, 10, -1), expected, **CLOSE)


def test_latest_segment() -> None:
    packed = TokenMap.pack([TokenMap.from_layout(LAYOUT[:5]), TokenMap.from_layout([("text", 2), ("image", 1)])])
    assert latest_segment(packed).tolist() == [[-1] * 2 + [1] * 6 + [3] * 7 + [-1] * 2 + [6]]
    left = TokenMap.batch([TokenMap.from_layout([("image", 1), ("text", 1)]), packed], side="left")
    assert latest_segment(left)[0].tolist() == [-1] * 16 + [0, 0]


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["cross_attention", "hyper_attention"])
def test_the_cache_holds_text_and_beside_it_media(fusion: str) -> None:
    model = tiny_model(fusion, kv_heads=2)
    batch = tiny_batch(model, LAYOUT)
    cache = model(batch["input_ids"], batch["tokens"], batch["pixel_values"], use_cache=True).past_key_values
    assert isinstance(cache, AsideCache)
    assert cache.get_seq_length() == 18
    assert [layer.keys.shape[2] for layer in cache.layers] == [10, 10]
    assert {index: k.shape[2] for index, (k, _) in cache.media.items()} == {0: 8, 1: 8}
    again = copy.deepcopy(cache)
    again.batch_repeat_interleave(2)
    assert again.media[0][0].shape[0] == again.text.shape[0] == again.layers[0].keys.shape[0] == 4
    again.batch_select_indices(torch.tensor([3]))
    assert torch.equal(again.media[1][1], cache.media[1][1][1:])
    again.reset()
    assert again.get_seq_length() == 0 and not again.media


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["cross_attention", "hyper_attention"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(fusion: str, beams: int) -> None:
    model = tiny_model(fusion)
    runs = [[("text", 2), ("image", 4), ("text", 3)], [("text", 6)], [("image", 4), ("image", 4), ("text", 1)]]
    batch = tiny_batch(model, runs, side="left")
    inputs = {"pixel_values": batch["pixel_values"], "num_beams": beams, "max_new_tokens": 6, "do_sample": False}
    cached, plain = (
        model.generate(batch["input_ids"], batch["tokens"], use_cache=use, **inputs) for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_another_cache_is_refused() -> None:
    model = tiny_model("cross_attention")
    batch = tiny_batch(model)
    with pytest.raises(TypeError, match=r"GatedCrossAttention keeps media beside .* make one with model.new_cache\(\)"):
        model(**batch, past_key_values=DynamicCache())
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        model.new_cache().crop(1)


def test_settings() -> None:
    with pytest.raises(ConfigError, match="every must be at least 1"):
        GatedCrossAttention(every=0)
    with pytest.raises(ConfigError, match="did you mean 'latest'"):
        GatedCrossAttention(reach="lates")  # type: ignore[arg-type]
    every_fourth = GatedCrossAttention(every=4)
    assert [i for i in range(9) if every_fourth.changes(i)] == [3, 7]
    assert [i for i in range(4) if GatedCrossAttention(layers=[1], every=4).changes(i)] == [1]
    assert HyperAttention(layers=[6]).changes(6)


def test_media_of_all_modalities_are_looked_at() -> None:
    for fusion in ("cross_attention", "hyper_attention"):
        model = tiny_model(fusion, modalities=("image", "audio"))
        batch = tiny_batch(model, [("image", 4), ("audio", 3), ("text", 2), ("answer", 2)])
        before = model(**batch).logits
        batch["audio_features"] = batch["audio_features"] + 1.0
        assert (model(**batch).logits - before).abs().max() > 1e-3
        assert (batch["tokens"].modality == Modality.AUDIO).any()
