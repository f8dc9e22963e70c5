"""The same model under another fusion: its own projector in every layer, its own positions, and nothing of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmfuse.fusion import FUSIONS
from mmfuse.models import MultimodalLM
from mmfuse.sequence import Role

CLOSE = {"rtol": 0.0, "atol": 1e-5}


def text_rows(model: Any, batch: dict[str, Any], logits: Tensor) -> Tensor:
    is_text = (batch["input_ids"] != model.config.media_token_ids["image"]) & batch["attention_mask"].bool()
    return logits[is_text]


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name not in ("causal", "prefix_lm")])
def test_another_fusion_changes_the_logits(vlm: Any, fusion: str) -> None:
    batch = vlm.batch((1, 2))
    native, other = MultimodalLM.from_vlm(vlm.folder), MultimodalLM.from_vlm(vlm.folder, fusion)
    for parameter in other.fusion.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # gates start at 0
    with torch.no_grad():
        before, after = (text_rows(native, batch, model(**batch).logits) for model in (native, other))
        assert (before - after).abs().max() > 1e-2
        if not list(other.fusion.parameters()):
            assert torch.equal(text_rows(native, batch, native(**batch, fusion=other.fusion).logits), after)


def test_off_is_causal(vlm: Any) -> None:
    batch = vlm.batch((1, 2))
    off = MultimodalLM.from_vlm(vlm.folder, {"type": "naavit", "layers": []})
    causal = MultimodalLM.from_vlm(vlm.folder, "causal")
    with torch.no_grad():
        assert torch.equal(off(**batch).logits, causal(**batch).logits)


def test_saisa_starts_as_the_decoder_with_its_images_put_in_before_each_layer(vlm: Any) -> None:
    """What the projector of each layer gives is packed and ordered as the model's own `get_image_features` does it."""
    batch = vlm.batch((1, 2))
    saisa, oracle = MultimodalLM.from_vlm(vlm.folder, "saisa"), MultimodalLM.from_vlm(vlm.folder, "causal")
    slots = batch["input_ids"] == oracle.config.media_token_ids["image"]
    inputs = {name: batch[name] for name in oracle.adapter.image_inputs if name in batch}

    def put_in(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        parts = oracle.vlm.model.get_image_features(**inputs, return_dict=True).pooler_output
        return (args[0].masked_scatter(slots.unsqueeze(-1), torch.cat(list(parts))),)

    hook = oracle.decoder.model.layers[1].register_forward_pre_hook(put_in)
    with torch.no_grad():
        expected = text_rows(oracle, batch, oracle(**batch).logits)
        torch.testing.assert_close(text_rows(saisa, batch, saisa(**batch).logits), expected, **CLOSE)
    hook.remove()
    with torch.no_grad():
        assert (text_rows(oracle, batch, oracle(**batch).logits) - expected).abs().max() > 1e-2


def test_saisa_has_a_projector_of_its_own_in_each_layer(vlm: Any) -> None:
    model = MultimodalLM.from_vlm(vlm.folder, "saisa").train()
    own = dict(model.connectors["image"].named_parameters())
    made = dict(model.fusion.projectors["1"]["image"].named_parameters())
    assert own.keys() == made.keys()
    for name, weight in made.items():
        assert weight is not own[name]
        assert torch.equal(weight, own[name])
    batch = vlm.batch((1, 2), side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # All text is an answer for this purpose: SAISA is causal, and may be taught any of it.
    labels[labels == model.config.media_token_ids["image"]] = -100
    model(**{**batch, "labels": labels}).loss.backward()
    for name, weight in (*own.items(), *made.items()):
        assert weight.grad is not None and weight.grad.abs().max() > 1e-7, name
    for weight in model.adapter.connector_parameters(model.vlm):
        assert weight.grad is not None and weight.grad.abs().max() > 0


@pytest.mark.parametrize("fusion", ["mma", "saisa", "composite"])
def test_generation_is_what_recomputing_gives(vlm: Any, fusion: str) -> None:
    model = MultimodalLM.from_vlm(vlm.folder, fusion)
    batch = vlm.batch((1, 2))
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(**batch, **how, output_logits=True, return_dict_in_generate=True)
    tokens = model.token_map(**{k: v for k, v in batch.items() if k not in ("pixel_values", "labels")})
    media = model.encode_media(batch)
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], tokens.append(3), media=media).logits
    start = batch["input_ids"].shape[1] - 1
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, whole[:, start + step], **CLOSE)
    # A beam's images go with it.
    beams = model.generate(**batch, **how, num_beams=2)
    alone = vlm.batch((1,))
    assert torch.equal(beams[0, -4:], model.generate(**alone, **how, num_beams=2)[0, -4:])


def test_parts_hold_each_parameter_once(vlm: Any) -> None:
    model = MultimodalLM.from_vlm(vlm.folder, "saisa")
    named = [id(weight) for part in model.parts().values() for weight in part.parameters()]
    assert len(named) == len(set(named))
    assert set(named) == {id(weight) for weight in model.parameters()}


def test_labels_tell_what_is_an_answer(llava: Any) -> None:
    model = MultimodalLM.from_vlm(llava.folder, "mma")
    batch = llava.batch((2,))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -4:-2] = batch["input_ids"][:, -4:-2]
    tokens = model.token_map(
        batch["input_ids"], batch["attention_mask"], labels=labels, media=model.encode_media(batch)
    )
    assert tokens.segment[0].tolist() == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 2 + [5] * 2
    assert tokens.turn[0, -1] == 1
    assert (tokens.role == Role.ANSWER).sum() == 2
    assert torch.isfinite(model(**batch, labels=labels).loss)
