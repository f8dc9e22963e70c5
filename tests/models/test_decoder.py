"""Our loop over Hugging Face layers against Hugging Face's own forward, and what the loop refuses."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from mmfuse.fusion import FUSIONS, Causal
from mmfuse.fusion.base import base_visibility
from mmfuse.kernels import BackendError, Visibility
from mmfuse.models import MultimodalLM
from mmfuse.models.attention import Request, visible_attention
from mmfuse.models.decoder import run_decoder, supervised_rows
from mmfuse.sequence import TokenMap
from mmfuse.testing import FAMILIES, backends_here, tiny_batch, tiny_model

LENGTH = 20  # past the sliding windows, which are 6


def twin(model: MultimodalLM) -> PreTrainedModel:
    """The same decoder with the same weights, run by Hugging Face alone."""
    config = copy.deepcopy(model.config.text_config)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    made.load_state_dict(model.decoder.state_dict())
    return made.eval()


def prompts(side: str = "right") -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[3, LENGTH]` of texts of different lengths."""
    ids = torch.randint(4, 64, (3, LENGTH))
    lengths = torch.tensor([LENGTH, 9, 4]).unsqueeze(1)
    slots = torch.arange(LENGTH).unsqueeze(0)
    return ids, (slots < lengths if side == "right" else slots >= LENGTH - lengths).long()


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_causal_equals_hugging_face(family: str, kv_heads: int, side: str) -> None:
    model = tiny_model("causal", family, kv_heads=kv_heads)
    ids, mask = prompts(side)
    expected = twin(model)(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    logits = model(ids, attention_mask=mask).logits
    live = mask.bool()
    torch.testing.assert_close(logits[live], expected[live], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_hugging_face(family: str) -> None:
    model = tiny_model("causal", family)
    other = twin(model)
    ids, mask = prompts("left")
    live = mask.bool()
    tokens = model.token_map(ids, mask)
    ours, theirs = None, DynamicCache(config=other.config)
    for start, stop in [(0, 9), (9, 12), *((i, i + 1) for i in range(12, LENGTH))]:
        out = model(ids[:, start:stop], tokens.columns(0, stop), past_key_values=ours, use_cache=True)
        ours = out.past_key_values
        expected = other(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions(mask)[:, start:stop],
            past_key_values=theirs,
            use_cache=True,
        ).logits
        here = live[:, start:stop]
        torch.testing.assert_close(out.logits[here], expected[here], rtol=0, atol=1e-5)
    kept = [layer.keys.shape[2] for layer in ours.layers]
    assert kept == [layer.keys.shape[2] for layer in theirs.layers]
    if "sliding_window" in FAMILIES[family]:
        assert min(kept) == FAMILIES[family]["sliding_window"] - 1, "nothing slid out: the test is blind"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_hugging_face(family: str) -> None:
    model = tiny_model("causal", family)
    other = twin(model)
    ids, mask = prompts()
    labels = torch.where(mask.bool(), ids, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    logits = other(input_ids=ids, attention_mask=mask).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    for (name, mine), theirs in zip(model.decoder.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_windows_matter() -> None:
    """The families with windows would not equal Hugging Face if the window were ignored."""
    narrow, wide = tiny_model(family="mistral"), tiny_model(family="mistral", sliding_window=40)
    ids, _ = prompts()
    difference = (narrow(ids).logits - wide(ids).logits).abs()
    assert difference[:, :6].max() < 1e-5
    assert difference[:, 8:].max() > 1e-2


# The attention function


def call(visibility: Any, **asked: Any) -> Tensor:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    module = SimpleNamespace(layer_idx=1)
    request = Request(visibility) if isinstance(visibility, Visibility) else visibility
    return visible_attention(module, q, k, k, request, **asked)[0]  # type: ignore[arg-type]


def test_attention_function_refuses_what_it_would_ignore() -> None:
    visibility = base_visibility(TokenMap.from_layout([("text", 3)]))
    assert call(visibility, softcap=None, s_aux=None, position_ids=torch.arange(3), use_cache=True).shape == (
        1,
        3,
        4,
        8,
    )
    for asked, name in (
        ({"dropout": 0.1}, "attention dropout"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"something_new": 1, "softcap": 2.0}, "softcap, something_new"),
    ):
        message = f"asks attention for {name}, which mmfuse does not compute"
        with pytest.raises(NotImplementedError, match=message):
            call(visibility, **asked)
    for mask in (None, torch.zeros(1, 1, 3, 3)):
        message = f"was given a mask of type {type(mask).__name__}; call the model through MultimodalLM"
        with pytest.raises(TypeError, match=message):
            call(mask)


def test_dropout_in_attention_is_refused_in_training_only() -> None:
    model = tiny_model(attention_dropout=0.1)
    batch = tiny_batch(model)
    assert torch.isfinite(model(**batch).loss)
    with pytest.raises(NotImplementedError, match="LlamaAttention asks attention for attention dropout"):
        model.train()(**batch)


def test_soft_capping_of_logits() -> None:
    capped = tiny_model(family="gemma3_text", final_logit_softcapping=1.5)
    ids = torch.randint(4, 64, (1, 8))
    torch.testing.assert_close(capped(ids).logits, twin(capped)(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_the_bare_decoder_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(TypeError, match="call the model through MultimodalLM"):
        model.decoder(input_ids=torch.randint(4, 64, (1, 5)))


def test_record_is_given_every_layers_weights() -> None:
    model = tiny_model("mma", "mistral")
    batch = tiny_batch(model)
    seen: dict[int, Tensor] = {}
    recorded = model(**batch, record=lambda layer, weights: seen.update({layer: weights})).logits
    assert torch.equal(recorded, model(**batch).logits)
    assert sorted(seen) == [0, 1]
    visible = model.fusion.visibility(batch["tokens"]).view(window=6, keys=14).dense()
    for weights in seen.values():
        assert weights.shape == (2, 4, 14, 14)
        assert torch.equal(weights > 0, visible.unsqueeze(1).expand_as(weights))


def test_maps_that_do_not_cover_the_tokens_are_refused() -> None:
    model = tiny_model()
    tokens = TokenMap.from_layout([("text", 6)])
    embeds = torch.randn(1, 5, 32)
    message = "the TokenMap describes [1, 6] tokens, but 0 are cached and 5 are given, in 1 samples"
    with pytest.raises(ValueError, match=re.escape(message)):
        run_decoder(model.decoder, embeds, tokens, Causal())
    with pytest.raises(ValueError, match=re.escape("describes [2, 6] tokens")):
        run_decoder(model.decoder, torch.randn(1, 6, 32), tokens.repeat(2), Causal())


def test_a_stale_cache_is_refused() -> None:
    model = tiny_model("mma")
    batch = tiny_batch(model)
    ids, tokens = batch["input_ids"], batch["tokens"]
    cache = model(ids[:, :9], tokens.columns(0, 9), batch["pixel_values"], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="sample 0: ModalityMutual lets cached tokens see the prompt tokens"):
        model(ids[:, 9:], tokens, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("backend", sorted({*backends_here()} - {"triton"}))  # that one is slow where it is interpreted
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_prompt_padded_on_the_right_can_be_continued(fusion: str, backend: str) -> None:
    model = tiny_model(fusion)
    model.config.attention_backend = backend
    batch = tiny_batch(model, [[("text", 2), ("image", 4), ("text", 5)], [("text", 3)]])
    ids, tokens, pixels = batch["input_ids"], batch["tokens"], batch["pixel_values"]
    answer = torch.randint(4, 64, (2, 3))
    try:
        cache = model(ids, tokens, pixels, use_cache=True).past_key_values
        cached = model(answer, tokens.append(3), past_key_values=cache).logits
    except BackendError as error:
        pytest.skip(str(error))
    whole = model(torch.cat([ids, answer], dim=1), tokens.append(3), pixels).logits[:, -3:]
    short = torch.cat([ids[1:, :3], answer[1:]], dim=1)
    alone = model(short, tokens.rows(1).columns(0, 3).append(3)).logits[0, -3:]
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(cached[1], alone, rtol=0, atol=1e-5)


# Where the loss is taken


def test_supervised_rows() -> None:
    maps = [TokenMap.from_layout(runs) for runs in ([("text", 2), ("answer", 2)], [("answer", 2)])]
    packed = TokenMap.pack(maps).pad(7)
    labels = torch.tensor([[-100, -100, 5, 6, 7, 8, 9]])
    rows, targets = supervised_rows(packed, labels, -100)
    # 7 is the first token of its document, 9 is padding.
    assert rows.tolist() == [[False, True, True, False, True, False, False]]
    assert targets.tolist() == [5, 6, 8]
