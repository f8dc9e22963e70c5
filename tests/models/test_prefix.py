"""Many questions about one image: with the cache of the prefix as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmfuse.fusion import FUSIONS
from mmfuse.models import MultimodalLM, PrefixCache
from mmfuse.testing import tiny_batch, tiny_model

PREFIX = [("text", 2), ("image", 4)]
QUESTIONS = [[*PREFIX, ("text", length)] for length in (3, 1, 5, 3)]
EXACT = [name for name, strategy in FUSIONS.items() if not strategy.shows_future]
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "output_scores": False}


def prompts(model: MultimodalLM) -> list[dict[str, Any]]:
    """Questions of different lengths about one image, with one beginning."""
    made = [tiny_batch(model, runs, batch=1, seed=number) for number, runs in enumerate(QUESTIONS)]
    for prompt in made:
        prompt["input_ids"][:, :6] = made[0]["input_ids"][:, :6]
        prompt["pixel_values"] = made[0]["pixel_values"]
    return made


def prefix_of(model: MultimodalLM, prompt: dict[str, Any]) -> PrefixCache:
    return PrefixCache(
        model, prompt["input_ids"][:, :6], prompt["tokens"].columns(0, 6), pixel_values=prompt["pixel_values"]
    )


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("fusion", EXACT)
def test_answers_are_those_without_the_cache(fusion: str, family: str, beams: int) -> None:
    model = tiny_model(fusion, family)
    made = prompts(model)
    prefix = prefix_of(model, made[0])
    for _ in range(2):  # the cache is copied, and serves again
        answers = prefix.generate(
            [p["input_ids"] for p in made], [p["tokens"] for p in made], num_beams=beams, **OPTIONS
        )
        for prompt, answer in zip(made, answers, strict=True):
            ids = prompt["input_ids"]
            expected = model.generate(
                ids, prompt["tokens"], pixel_values=prompt["pixel_values"], num_beams=beams, **OPTIONS
            )[0, ids.shape[1] :]
            assert torch.equal(answer[: len(expected)], expected)
    assert len(prefix) == 6


@torch.no_grad()
@pytest.mark.parametrize("fusion", EXACT)
def test_logits_are_those_without_the_cache(fusion: str) -> None:
    model = tiny_model(fusion)
    prompt = prompts(model)[2]
    ids, tokens = prompt["input_ids"], prompt["tokens"]
    expected = model(ids, tokens, prompt["pixel_values"]).logits[:, 6:]
    cached = model(ids[:, 6:], tokens, past_key_values=prefix_of(model, prompt).cache()).logits
    torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name not in EXACT])
def test_media_that_look_at_the_question_refuse_it(fusion: str) -> None:
    model = tiny_model(fusion)
    prompt = prompts(model)[0]
    with pytest.raises(ValueError, match=f"{FUSIONS[fusion].__name__} lets cached tokens see the prompt tokens"):
        prefix_of(model, prompt).generate([prompt["input_ids"]], [prompt["tokens"]], **OPTIONS)


def test_what_is_no_prefix_is_refused() -> None:
    model = tiny_model()
    first, second = prompts(model)[:2]
    prefix = prefix_of(model, first)
    changed = second["input_ids"].clone()
    changed[0, 0] += 1
    with pytest.raises(ValueError, match="prompt 1 does not consist of the prefix"):
        prefix.generate([first["input_ids"], changed], [first["tokens"], second["tokens"]], **OPTIONS)
    with pytest.raises(ValueError, match="one sample without padding"):
        PrefixCache(model, first["input_ids"].repeat(2, 1), first["tokens"].repeat(2))
