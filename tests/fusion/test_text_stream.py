"""The text-stream engine against unmodified Hugging Face decoders with hooks and masks: forward, backward, decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mmfuse.errors import ConfigError
from mmfuse.fusion import FUSIONS, NAAViT, build_fusion
from mmfuse.fusion.base import MediaPath, MediaUpdate
from mmfuse.models import MultimodalLM
from mmfuse.sequence import Modality
from mmfuse.testing import FAMILIES, tiny_batch, tiny_model

LAYOUT = [("text", 2), ("image", 4), ("text", 2), ("image", 4), ("image", 4), ("text", 3), ("answer", 3)]
MEDIA = slice(2, 6), slice(8, 16)
#: Families whose layers have no window, so that one mask serves all layers.
WITHOUT_WINDOW = ["llama", "qwen3", "smollm3"]
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def three_layers(fusion: Any, family: str = "llama", **overrides: Any) -> MultimodalLM:
    """Three layers, so that what a layer leaves of media is read twice."""
    more = {"smollm3": {"no_rope_layers": [1, 0, 1]}, "qwen2": {"max_window_layers": 2}}.get(family, {})
    if family == "gemma3_text":
        more = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    return tiny_model(fusion, family, num_hidden_layers=3, **more, **overrides)


def twin(model: MultimodalLM) -> PreTrainedModel:
    """The same decoder with the same weights, run by Hugging Face alone."""
    config = copy.deepcopy(model.config.text_config)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    made.load_state_dict(model.decoder.state_dict())
    return made.eval()


def embeds_and_features(model: MultimodalLM, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`[B, S, D]` with the connector's output in the media slots, and the encoder's features `[N, V, De]`."""
    features = model.encoders["image"](batch["pixel_values"])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    slots = batch["tokens"].modality == Modality.IMAGE
    return embeds.masked_scatter(slots.unsqueeze(-1), model.connectors["image"](features)), features


def overwrite_media(other: PreTrainedModel, states: list[Tensor], slots: Tensor) -> None:
    """Put `states[i]` into the media `slots [B, S]` in front of layer i."""

    def hook(state: Tensor) -> Any:
        return lambda _, args, kwargs: ((args[0].masked_scatter(slots.unsqueeze(-1), state), *args[1:]), kwargs)

    for layer, state in zip(other.model.layers, states, strict=True):
        layer.register_forward_pre_hook(hook(state), with_kwargs=True)


def compare(model: MultimodalLM, batch: dict[str, Any], expected: Tensor) -> None:
    """Logits of text are the expected ones and those of media 0."""
    logits = model(**batch).logits
    media = batch["tokens"].is_media
    torch.testing.assert_close(logits[~media], expected[~media], **CLOSE)
    assert not logits[media].any()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_saisa_is_a_causal_decoder_with_overwritten_slots(family: str, kv_heads: int) -> None:
    model = three_layers("saisa", family, kv_heads=kv_heads)
    batch = tiny_batch(model, LAYOUT)
    other = twin(model)
    embeds, features = embeds_and_features(model, batch)
    projectors = [model.connectors["image"], *(model.fusion.projectors[str(i)]["image"] for i in (1, 2))]
    states = [project(features).reshape(-1, 32) for project in projectors]
    overwrite_media(other, states, batch["tokens"].is_media)
    compare(model, batch, other(inputs_embeds=embeds).logits)


def test_saisa_gradients_are_those_of_the_oracle() -> None:
    model = three_layers("saisa")
    batch = tiny_batch(model, LAYOUT)
    other = twin(model)
    direction = torch.randn(2, 22, 64)
    direction[batch["tokens"].is_media] = 0
    (model(**batch).logits * direction).sum().backward()
    mine = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    embeds, features = embeds_and_features(model, batch)
    projectors = [model.connectors["image"], *(model.fusion.projectors[str(i)]["image"] for i in (1, 2))]
    overwrite_media(other, [p(features).reshape(-1, 32) for p in projectors], batch["tokens"].is_media)
    (other(inputs_embeds=embeds).logits * direction).sum().backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    theirs |= {f"decoder.{name}": weight.grad for name, weight in other.named_parameters()}
    # The embedding of the input belongs to the model, the rest of the decoder to its twin.
    theirs["decoder.model.embed_tokens.weight"] = model.get_input_embeddings().weight.grad
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-5 * scale, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("family", WITHOUT_WINDOW)
@pytest.mark.parametrize("fusion", ["composite", {"type": "naavit", "reading": "self_only"}], ids=str)
def test_composite_is_a_decoder_with_diagonal_media_rows(fusion: Any, family: str) -> None:
    model = three_layers(fusion, family)
    batch = tiny_batch(model, LAYOUT)
    seen = torch.ones(22, 22, dtype=torch.bool).tril()
    for media in MEDIA:
        seen[media] = torch.eye(22, dtype=torch.bool)[media]
    mask = torch.zeros(22, 22).masked_fill(~seen, -torch.inf).expand(2, 1, -1, -1)
    embeds, _ = embeds_and_features(model, batch)
    compare(model, batch, twin(model)(inputs_embeds=embeds, attention_mask=mask).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fusion", ["composite", {"type": "naavit", "reading": "self_only"}], ids=str)
def test_keys_alone_equal_rows_under_the_mask(fusion: Any, family: str) -> None:
    """The same strategy with its media as rows of the layer and nothing but its mask, sliding windows included."""
    model = three_layers(fusion, family)
    batch = tiny_batch(model, LAYOUT)
    masked = build_fusion(fusion)
    masked.media_path = MediaPath.ROWS
    compare(model, batch, model(**batch, fusion=masked).logits)


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [0, 2], [1], [2]])
@pytest.mark.parametrize("family", WITHOUT_WINDOW)
def test_frozen_layers_are_those_of_a_decoder_whose_media_are_put_back(family: str, layers: list[int] | None) -> None:
    model = three_layers({"type": "naavit", "layers": layers}, family)
    batch = tiny_batch(model, LAYOUT)
    other = twin(model)
    frozen = range(3) if layers is None else layers
    slots = batch["tokens"].is_media.unsqueeze(-1)

    def put_back(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return torch.where(slots, args[0], out)

    for index in frozen:
        other.model.layers[index].register_forward_hook(put_back)
    expected = other(inputs_embeds=embeds_and_features(model, batch)[0]).logits
    logits = model(**batch).logits
    computed = ~batch["tokens"].is_media if model.fusion.changes(2) else torch.ones(2, 22, dtype=torch.bool)
    torch.testing.assert_close(logits[computed], expected[computed], **CLOSE)


@torch.no_grad()
def test_media_that_pass_the_feed_forward_network_alone() -> None:
    model = three_layers({"type": "naavit", "feed_forward": True})
    batch = tiny_batch(model, LAYOUT)
    other = twin(model)
    slots = batch["tokens"].is_media.unsqueeze(-1)

    def feed_forward(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        hidden = args[0]
        return torch.where(slots, hidden + layer.mlp(layer.post_attention_layernorm(hidden)), out)

    for layer in other.model.layers:
        layer.register_forward_hook(feed_forward)
    compare(model, batch, other(inputs_embeds=embeds_and_features(model, batch)[0]).logits)


@torch.no_grad()
def test_text_only_reading_is_its_mask() -> None:
    model = three_layers({"type": "naavit", "reading": "text_only"})
    batch = tiny_batch(model, LAYOUT)
    seen = torch.ones(22, 22, dtype=torch.bool).tril()
    for rows in MEDIA:
        for columns in MEDIA:
            seen[rows, columns] = False
    mask = torch.zeros(22, 22).masked_fill(~seen, -torch.inf).expand(2, 1, -1, -1)
    expected = twin(model)(inputs_embeds=embeds_and_features(model, batch)[0], attention_mask=mask).logits
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)


def test_the_engine_spends_nothing_on_queries_and_feed_forward_of_media() -> None:
    """Rows that each matrix of a layer is given: media reach k and v alone, and with EE-MLLM o and the FFN."""
    for fusion, counted in (
        ("saisa", {"q_proj": 8, "k_proj": 20, "o_proj": 8, "gate_proj": 8}),
        ("composite", {"q_proj": 8, "k_proj": 20, "o_proj": 20, "gate_proj": 20}),
        ("causal", {"q_proj": 20, "k_proj": 20, "o_proj": 20, "gate_proj": 20}),
    ):
        model = tiny_model(fusion)
        rows: dict[str, int] = {}
        for name, module in model.decoder.model.layers[0].named_modules():
            key = name.rpartition(".")[2]
            if key in counted:
                module.register_forward_hook(
                    lambda _, args, __, key=key, rows=rows: rows.update({key: rows.get(key, 0) + args[0].shape[1]})
                )
        model(**tiny_batch(model, [("text", 2), ("image", 12), ("text", 3), ("answer", 3)], batch=1))
        assert rows == counted, fusion


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_equal_gradients(fusion: str, family: str) -> None:
    model = tiny_model(fusion, family).train()
    batch = tiny_batch(model)
    model(**batch).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    for name, weight in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_training_batch_without_media_still_uses_every_parameter(fusion: str) -> None:
    """Otherwise ranks of FSDP and DDP would wait for each other; what is predicted stays as it is in evaluation."""
    model = tiny_model(fusion)
    batch = tiny_batch(model, [("text", 4), ("answer", 2)])
    expected = model(**batch).logits
    output = model.train()(**batch)
    assert torch.equal(output.logits, expected)
    output.loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name


def test_saisa_starts_from_the_connector_and_starts_again_when_asked() -> None:
    model = tiny_model("saisa")
    model.fusion.start_from(dict(model.connectors.items()))
    connector = model.connectors["image"].state_dict()
    for projectors in model.fusion.projectors.values():
        for name, weight in projectors["image"].state_dict().items():
            assert torch.equal(weight, connector[name])
            assert weight.data_ptr() != connector[name].data_ptr()


def test_saisa_has_a_projector_for_each_layer_and_modality() -> None:
    model = tiny_model({"type": "saisa", "layers": [0, 1]}, modalities=("image", "audio"))
    assert {k: sorted(v) for k, v in model.fusion.projectors.items()} == {"1": ["audio", "image"]}
    # Two projectors and the connector share nothing: changing one changes what its layer reads.
    batch = tiny_batch(model, [("text", 1), ("image", 4), ("audio", 3), ("text", 2), ("answer", 2)])
    before = model(**batch).logits
    for weight in model.fusion.projectors["1"]["audio"].parameters():
        weight.data += 1.0
    assert (model(**batch).logits - before).abs().max() > 1e-2


def test_naavit_settings() -> None:
    assert NAAViT().media_update == MediaUpdate()
    assert NAAViT(feed_forward=True).media_update == MediaUpdate(feed_forward=True)
    assert NAAViT(reading="text_only").media_path is MediaPath.ROWS
    with pytest.raises(ConfigError, match="did you mean 'self_only'"):
        NAAViT(reading="self-only")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="feed_forward belongs to reading 'no_query'"):
        NAAViT(reading="text_only", feed_forward=True)
