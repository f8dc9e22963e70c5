"""`generate` against a loop that recomputes everything, compared by logits: greedy tokens alone hide a wrong mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmfuse.fusion import FUSIONS
from mmfuse.models import MultimodalLM
from mmfuse.sequence import TokenMap
from mmfuse.testing import FAMILIES, tiny_batch, tiny_model

NEW = 8  # with the prompts, past the sliding windows
PROMPTS = [
    [("text", 3), ("image", 4), ("text", 4)],
    [("text", 2)],
    [("text", 2), ("image", 4), ("text", 1), ("image", 4), ("text", 2)],
]


def prompt_batch(model: MultimodalLM, layouts: Any = PROMPTS) -> dict[str, Any]:
    batch = tiny_batch(model, layouts, side="left")
    del batch["labels"]
    return batch


def generate(model: MultimodalLM, batch: dict[str, Any], **options: Any) -> Any:
    """New tokens `[B, NEW]` and their logits `[B, NEW, V]`; nothing ends a sample early."""
    out = model.generate(
        **batch,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )
    return out.sequences[:, -NEW:], torch.stack(out.logits, dim=1)


@torch.no_grad()
def recompute(model: MultimodalLM, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Greedy decoding without a cache: the whole sequence anew for every token."""
    ids, tokens, logits = batch["input_ids"], batch["tokens"], []
    for _ in range(NEW):
        logits.append(model(ids, tokens, batch.get("pixel_values")).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        tokens = tokens.append()
    return ids[:, -NEW:], torch.stack(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_greedy_equals_recomputation(fusion: str, family: str) -> None:
    model = tiny_model(fusion, family)
    batch = prompt_batch(model)
    chosen, logits = generate(model, batch)
    expected, expected_logits = recompute(model, batch)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_left_padding_has_no_effect(fusion: str) -> None:
    model = tiny_model(fusion, "mistral")
    _, together = generate(model, prompt_batch(model))
    batch = prompt_batch(model)
    images, seen = [1, 0, 2], 0
    for row, count in enumerate(images):
        live = ~batch["tokens"].is_pad[row : row + 1]
        alone = {
            "input_ids": batch["input_ids"][row : row + 1, live[0]],
            "tokens": batch["tokens"].rows(row).select(live),
        }
        if count:
            alone["pixel_values"] = batch["pixel_values"][seen : seen + count]
        seen += count
        torch.testing.assert_close(generate(model, alone)[1][0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_cache_changes_nothing(fusion: str) -> None:
    model = tiny_model(fusion, "gemma3_text")
    batch = prompt_batch(model)
    cached, cached_logits = generate(model, batch, use_cache=True)
    plain, plain_logits = generate(model, batch, use_cache=False)
    torch.testing.assert_close(cached_logits, plain_logits, rtol=0, atol=1e-5)
    assert torch.equal(cached, plain)


def test_the_map_is_made_from_ids_and_attention_mask() -> None:
    model = tiny_model("mma")
    batch = prompt_batch(model)
    mask = (~batch["tokens"].is_pad).long()
    _, expected = generate(model, batch)
    without_map = {name: batch[name] for name in ("input_ids", "pixel_values")}
    _, logits = generate(model, {**without_map, "attention_mask": mask})
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_prompts_padded_on_the_right_are_refused() -> None:
    model = tiny_model("mma")
    batch = tiny_batch(model, PROMPTS, side="right")
    message = "generation needs prompts padded on the left: a row ends in padding"
    with pytest.raises(ValueError, match=message):
        model.generate(batch["input_ids"], batch["tokens"], pixel_values=batch["pixel_values"], max_new_tokens=2)
    ids, mask = torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match=message):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_a_sample_that_has_ended_is_padded() -> None:
    model = tiny_model("mma")
    batch = prompt_batch(model)
    chosen, logits = generate(model, batch)
    end = int(chosen[0, 2])
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": end}
    sequences = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, free in zip(sequences.tolist(), chosen.tolist(), strict=True):
        length = free.index(end) + 1 if end in free else NEW
        expected = free[:length] + [0] * (NEW - length)
        assert row == expected[: len(row)]
    assert (sequences == 0).any()
    assert torch.isfinite(logits).all()


# Beams


def beams(model: Any, inputs: dict[str, Any], count: int = 3) -> tuple[Tensor, Tensor]:
    out = model.generate(
        **inputs,
        num_beams=count,
        num_return_sequences=count,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return out.sequences, out.sequences_scores


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_beam_search_equals_hugging_face_on_text(family: str) -> None:
    model = tiny_model("causal", family)
    other = AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config.text_config), attn_implementation="eager"
    ).eval()
    other.load_state_dict(model.decoder.state_dict())
    ids = torch.randint(4, 64, (2, 7))
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    (sequences, scores), (expected, expected_scores) = beams(model, inputs), beams(other, inputs)
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_scores_of_beams_are_those_of_their_own_images(fusion: str) -> None:
    """Several images and none in one batch: each beam is scored again with the images of its own sample."""
    model = tiny_model(fusion)
    batch = prompt_batch(model)
    sequences, scores = beams(model, batch)
    assert sequences.shape[0] == 9
    groups = [batch["pixel_values"][:1], None, batch["pixel_values"][1:]]
    prompt = batch["input_ids"].shape[1]
    for beam, (sequence, score) in enumerate(zip(sequences, scores, strict=True)):
        row = beam // 3
        tokens: TokenMap = batch["tokens"].rows(row).append(5)
        logits = model(sequence[None], tokens, groups[row]).logits[0, prompt - 1 : -1]
        own = logits.log_softmax(-1).gather(1, sequence[prompt:, None]).sum() / 5
        torch.testing.assert_close(own, score, rtol=0, atol=1e-5)


def test_sampling_follows_the_seed() -> None:
    model = tiny_model("mma")
    batch = prompt_batch(model)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate(model, batch, do_sample=True, temperature=2.0, num_return_sequences=2)[0])
    assert drawn[0].shape == (6, NEW)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0::2], drawn[0][1::2])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_later_turn_with_a_new_image_goes_on_from_the_cache(fusion: str, beams: int) -> None:
    model = tiny_model(fusion)
    turn = [("text", 2), ("image", 4), ("text", 2)]
    batch = tiny_batch(model, [*turn, ("answer", 3), *turn])
    ids, tokens, images = batch["input_ids"], batch["tokens"], batch["pixel_values"]
    cache = None
    # As a chat does: the prompt is read as a whole, its answer token by token.
    for start, stop in ((0, 8), (8, 11)):
        pixels = images[::2] if start == 0 else None
        out = model(ids[:, start:stop], tokens.columns(0, stop), pixels, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    options = {"num_beams": beams, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, tokens, pixel_values=images, **options)
    assert torch.equal(
        model.generate(ids, tokens, pixel_values=images[1::2], past_key_values=cache, **options), expected
    )
