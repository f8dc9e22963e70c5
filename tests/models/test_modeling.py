"""MultimodalLM: what one pass computes, what it refuses, and how it is saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from mmfuse.fusion import Causal, PrefixLM
from mmfuse.models import MultimodalLM
from mmfuse.sequence import Modality, Role, TokenMap
from mmfuse.testing import FAMILIES, IMAGE_TOKEN_ID, tiny_batch, tiny_model

RAGGED = [
    [("text", 2), ("image", 4), ("text", 3), ("answer", 4)],
    [("text", 3), ("answer", 2)],
    [("text", 1), ("image", 4), ("image", 4), ("answer", 1)],
]


def gradients(model: MultimodalLM) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


# The loss


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_equals_the_plain_cross_entropy(side: str) -> None:
    model = tiny_model("mma")
    batch = tiny_batch(model, RAGGED, side=side)
    out = model(**batch)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)
    assert int(out.supervised) == 4 + 2 + 1
    out.loss.backward()
    mine = gradients(model)
    logits = model(**batch).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)


def test_loss_alone_needs_no_logits() -> None:
    model = tiny_model()
    batch = tiny_batch(model, RAGGED)
    projected: list[int] = []
    model.decoder.lm_head.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0].numel() // 32))
    out = model(**batch, return_logits=False)
    assert out.logits is None
    assert projected == [7], "only supervised rows are projected to the vocabulary"
    assert torch.equal(out.loss, model(**batch).loss)


def test_a_pack_does_not_predict_the_next_document() -> None:
    model = tiny_model()
    layout = [("answer", 3)]
    batch = tiny_batch(model, [layout, layout], pack=True)
    assert batch["tokens"].document.tolist() == [[0, 0, 0, 1, 1, 1]]
    out = model(**batch)
    assert int(out.supervised) == 4
    logits, labels = out.logits[0, [0, 1, 3, 4]], batch["labels"][0, [1, 2, 4, 5]]
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, labels), rtol=1e-6, atol=1e-6)


def test_a_batch_without_labels_to_learn_has_loss_zero() -> None:
    model = tiny_model()
    batch = tiny_batch(model)
    batch["labels"][:] = -100
    out = model(**batch)
    assert int(out.supervised) == 0
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert all(bool((gradient == 0).all()) for gradient in gradients(model).values())


def test_logits_to_keep() -> None:
    model = tiny_model("mma")
    batch = tiny_batch(model)
    whole = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, whole[:, -3:], rtol=0, atol=1e-6)
    assert torch.equal(model(**batch, logits_to_keep=0).logits, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_equal_gradients(family: str) -> None:
    model = tiny_model("mma", family).train()
    batch = tiny_batch(model, RAGGED)
    calls: list[int] = []
    model.decoder.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model(**batch).loss.backward()
    plain = gradients(model)
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    assert len(calls) == 3, "the layer ran once forward and once more in the backward pass"
    again = gradients(model)
    assert again.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# Media


def test_features_stand_in_reading_order() -> None:
    model = tiny_model()
    batch = tiny_batch(model, RAGGED)
    seen: list[Tensor] = []
    model.decoder.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    features = model.connectors["image"](model.encoders["image"](batch["pixel_values"]))
    slots = batch["tokens"].modality == Modality.IMAGE
    assert torch.equal(seen[0][slots], features.flatten(0, 1))
    embedded = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(seen[0][~slots], embedded[~slots])


def test_placeholders_and_features_must_agree() -> None:
    model = tiny_model()
    batch = tiny_batch(model, RAGGED)
    pixels = batch.pop("pixel_values")
    message = "12 image placeholders in the batch (by sample: [4, 0, 8]) but 8 features: 2 inputs × 4 tokens"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**batch, pixel_values=pixels[:2])
    with pytest.raises(ValueError, match="the batch has 12 image tokens but no image inputs were given"):
        model(**batch)
    text = tiny_batch(model, [("text", 3), ("answer", 2)])
    with pytest.raises(ValueError, match=re.escape("0 image placeholders in the batch (by sample: [0, 0]) but 12")):
        model(**text, pixel_values=pixels)


def test_a_training_batch_without_images_still_runs_the_encoder() -> None:
    model = tiny_model()
    batch = tiny_batch(model, [("text", 3), ("answer", 2)])
    ran: list[int] = []
    model.encoders["image"].register_forward_hook(lambda *_: ran.append(1))
    expected = model(**batch).logits
    assert ran == [], "evaluation has no ranks to keep in step"
    out = model.train()(**batch)
    assert ran == [1]
    assert torch.equal(out.logits, expected)
    out.loss.backward()
    for name, weight in [*model.encoders.named_parameters(), *model.connectors.named_parameters()]:
        assert weight.grad is not None and bool((weight.grad == 0).all()), name


# The map made from ids alone


def test_token_map_finds_media_by_placeholder() -> None:
    model = tiny_model()
    ids = torch.tensor([[9, 3, 3, 8, 8, 0, 3], [0, 3, 7, 3, 3, 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    tokens = model.token_map(ids, mask)
    assert tokens.modality.tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert tokens.role.tolist() == mask.tolist()
    assert tokens.document.tolist() == (mask - 1).tolist()
    assert tokens.turn.tolist() == (mask - 1).tolist()
    assert tokens.position.tolist() == [[0, 1, 2, 3, 4, 0, 0], [0, 0, 0, 1, 2, 3, 4]]
    assert tokens.segment[0].tolist() == [0, 1, 1, 2, 2, -1, -1]
    assert tokens.segment[1, :2].tolist() == [-1, -1]
    assert len(set(tokens.segment[1, 2:].tolist())) == 2
    assert model.token_map(ids[:, :5]) == TokenMap.batch([model.token_map(ids[i : i + 1, :5]) for i in range(2)])


def test_a_pass_without_a_map_takes_all_text_as_prompt() -> None:
    model = tiny_model("mma")
    batch = tiny_batch(model, [("text", 3), ("image", 4), ("text", 4)])
    logits = model(batch["input_ids"], pixel_values=batch["pixel_values"]).logits
    assert torch.equal(logits, model(**batch).logits)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), batch["input_ids"]], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 11, dtype=torch.long)], dim=1)
    again = model(padded, pixel_values=batch["pixel_values"], attention_mask=mask).logits
    torch.testing.assert_close(again[:, 3:], logits, rtol=0, atol=1e-5)


def test_a_filled_cache_needs_a_map() -> None:
    model = tiny_model()
    ids = torch.randint(4, 64, (1, 5))
    cache = model(ids, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    with pytest.raises(ValueError, match="with a filled cache, `tokens` must describe the cached tokens and the new"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="the TokenMap describes"):
        model(ids[:, :1], TokenMap.from_layout([("text", 5)]), past_key_values=cache)


def test_return_dict_false_is_refused() -> None:
    with pytest.raises(ValueError, match="return_dict=False is not supported"):
        tiny_model()(torch.randint(4, 64, (1, 5)), return_dict=False)


def test_another_strategy_can_take_one_pass() -> None:
    model, other = tiny_model("mma"), tiny_model("prefix_lm")
    batch = tiny_batch(model)
    assert torch.equal(model(**batch, fusion=PrefixLM()).logits, other(**batch).logits)
    assert torch.equal(model(**batch, fusion=Causal()).logits, tiny_model("causal")(**batch).logits)
    captions = batch | {"labels": torch.where(batch["input_ids"] == IMAGE_TOKEN_ID, -100, batch["input_ids"])}
    assert int(model(**captions, fusion=Causal()).supervised) == 2 * 9
    with pytest.raises(ValueError, match="ModalityMutual"):
        model(**captions)


# Parts, saving, loading


def test_parts_are_all_there_is() -> None:
    model = tiny_model()
    names = [f"{part}" for part in model.parts()]
    assert names == ["encoder", "connector", "decoder", "fusion"]
    counted = [id(weight) for part in model.parts().values() for weight in part.parameters()]
    assert sorted(counted) == sorted(id(weight) for weight in model.parameters())


def test_building_leaves_the_callers_random_state_alone_and_follows_its_seed() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (tiny_model(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["decoder.lm_head.weight"], other["decoder.lm_head.weight"])
    assert 0.15 < float(one["decoder.lm_head.weight"].std()) < 0.25


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_classes_load_what_was_saved(auto: Any, tmp_path: Path) -> None:
    model = tiny_model({"type": "mma", "layers": [0]})
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is MultimodalLM
    assert AutoConfig.from_pretrained(tmp_path).fusion == {"type": "mma", "layers": [0]}
    batch = tiny_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_tied_embeddings_survive_saving(family: str, tmp_path: Path) -> None:
    model = tiny_model("mma", family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = MultimodalLM.from_pretrained(tmp_path)
    batch = tiny_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    for made in (model, loaded):
        assert made.get_output_embeddings().weight is made.get_input_embeddings().weight


def test_layers_that_do_not_exist_are_refused() -> None:
    message = "ModalityMutual(layers=…) names layer 2; the decoder has 0..1"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model({"type": "mma", "layers": [0, 2]})


def test_roles_decide_and_not_token_ids() -> None:
    """The same ids mean something else under another map."""
    model = tiny_model("mma")
    batch = tiny_batch(model, batch=1)
    tokens = batch["tokens"]
    spoken = TokenMap(
        modality=tokens.modality,
        role=torch.where(tokens.prompt_text & (tokens.position > 6), int(Role.ANSWER), tokens.role),
        segment=tokens.segment,
        turn=tokens.turn,
        document=tokens.document,
        position=tokens.position,
    )
    as_answer = model(batch["input_ids"], spoken, batch["pixel_values"]).logits
    causal = model(batch["input_ids"], tokens, batch["pixel_values"], fusion=Causal()).logits
    torch.testing.assert_close(as_answer, causal, rtol=0, atol=1e-5)
    assert (as_answer - model(**batch).logits).abs().max() > 1e-2
