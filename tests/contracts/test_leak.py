"""Contract 1: what an answer token says is known to nothing before it: to no logit and to no state of a medium."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmfuse.fusion import CLASSES, FUSIONS, Fusion
from mmfuse.fusion.base import ANSWER, CAUSAL_RULES, MEDIA, PROMPT, axis_of
from mmfuse.kernels import Condition, Visibility
from mmfuse.models import MultimodalLM
from mmfuse.models.passes import scatter_rows
from mmfuse.sequence import Role, TokenMap, kept_index
from mmfuse.testing import IMAGE_TOKEN_ID, tiny_batch, tiny_model

Batch = dict[str, Any]

# A leak moves these tiny models by 1e-3 and more; rounding moves them by 1e-6 and less.
TOLERANCE = 1e-5


class PaperLiteral(Fusion):
    """The paper's general rule taken literally: whatever differs in modality is visible. Media read the answer."""

    shows_future = True

    def visibility(self, tokens: TokenMap) -> Visibility:
        rules = {**CAUSAL_RULES, (MEDIA, PROMPT): (Condition.ALWAYS,), (MEDIA, ANSWER): (Condition.ALWAYS,)}
        return Visibility(axis_of(tokens), axis_of(tokens), rules, CLASSES)


class AllQuestions(Fusion):
    """Media read the questions of later turns too, and those have read the answers of earlier ones."""

    shows_future = True

    def visibility(self, tokens: TokenMap) -> Visibility:
        rules = {**CAUSAL_RULES, (MEDIA, PROMPT): (Condition.ALWAYS,)}
        return Visibility(axis_of(tokens), axis_of(tokens), rules, CLASSES)


def run(model: MultimodalLM, batch: Batch, delta: Tensor, fusion: Fusion | None = None) -> tuple[Tensor, Tensor]:
    """States of all layers `[B, S, L * D]` and logits `[B, S, V]` when `delta [B, S, D]` is added to the embeddings.

    Layers that run on text alone give states of text; those of media are 0.
    """
    states: list[Tensor] = []
    tokens = batch["tokens"]
    text = kept_index(~tokens.is_media & ~tokens.is_pad)
    hooks = [model.get_input_embeddings().register_forward_hook(lambda _, __, embeds: embeds + delta)]
    hooks += [
        layer.register_forward_hook(lambda _, __, out: states.append(out)) for layer in model.decoder.model.layers
    ]
    try:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, fusion=fusion).logits
    finally:
        for hook in hooks:
            hook.remove()
    whole = [x if x.shape[1] == len(tokens) else scatter_rows(x, text, len(tokens)) for x in states]
    return torch.cat(whole, dim=-1), logits


def find_leaks(model: MultimodalLM, batch: Batch, fusion: Fusion | None = None) -> list[str]:
    """Each way in which an answer token reaches what stands before it, or another document.

    Every answer token's embedding is perturbed, and the logits and states in front of it are differentiated by it.
    """
    tokens = batch["tokens"]
    width = model.config.text_config.hidden_size
    delta = torch.zeros(*tokens.shape, width, requires_grad=True)
    states, logits = run(model, batch, delta, fusion)
    clean = {"state": states, "logit": logits}
    direction = {name: torch.randn_like(value) for name, value in clean.items()}
    leaks = []
    for row, slot in tokens.is_answer.nonzero().tolist():
        protected = torch.ones(tokens.shape, dtype=torch.bool)
        protected[row] = (torch.arange(len(tokens)) < slot) | (tokens.document[row] != tokens.document[row, slot])
        changed = torch.zeros_like(delta)
        changed[row, slot] = torch.randn(width)
        with torch.no_grad():
            perturbed = dict(zip(clean, run(model, batch, changed, fusion), strict=True))
        for name, value in clean.items():
            moved = (perturbed[name] - value).detach().abs().amax(-1)
            for at in (protected & (moved > TOLERANCE)).nonzero().tolist():
                kind = "medium" if tokens.is_media[tuple(at)] else "text"
                leaks.append(f"answer ({row}, {slot}) moves a {kind} {name} at {tuple(at)}")
            probe = (value * direction[name]).sum(-1)
            (gradient,) = torch.autograd.grad(probe[protected].sum(), delta, retain_graph=True)
            if gradient[row, slot].abs().max() > TOLERANCE:
                leaks.append(f"answer ({row}, {slot}) has a gradient from a {name} before it")
            (after,) = torch.autograd.grad(probe[~protected].sum(), delta, retain_graph=True)
            assert after[row, slot].abs().max() > TOLERANCE, "the token reaches nothing at all: the check is blind"
    return leaks


def test_no_answer_leak(model: MultimodalLM, batch: Batch) -> None:
    assert find_leaks(model, batch) == []


def test_the_check_catches_media_that_see_the_answer(family: str) -> None:
    model = tiny_model("causal", family)
    short = [("text", 2), ("image", 4), ("text", 1), ("answer", 2)]  # inside the sliding windows
    leaks = find_leaks(model, tiny_batch(model, short), PaperLiteral())
    for leak in (
        "answer (0, 8) moves a medium state at (0, 5)",
        "answer (1, 7) moves a text state at (1, 6)",
        "answer (0, 8) moves a text logit at (0, 7)",
        "answer (0, 8) has a gradient from a logit before it",
    ):
        assert leak in leaks


def test_the_check_catches_media_that_see_a_later_question() -> None:
    # One layer carries the answer to the question, one the question to the image, one the image to the answer's logit.
    model = tiny_model("causal", num_hidden_layers=3)
    turns = [("text", 2), ("image", 4), ("text", 2), ("answer", 3), ("text", 3), ("answer", 2)]
    leaks = find_leaks(model, tiny_batch(model, turns, batch=1), AllQuestions())
    assert "answer (0, 10) moves a medium state at (0, 5)" in leaks
    assert "answer (0, 10) moves a text logit at (0, 9)" in leaks
    assert not any(leak.startswith("answer (0, 14)") for leak in leaks)
    assert find_leaks(model, tiny_batch(model, turns, batch=1), FUSIONS["mma"]()) == []


def test_a_question_changes_what_the_strategy_says_it_changes() -> None:
    """The counterpart of the leak tests: under MMA an image state depends on the question, under Causal it does not."""
    model = tiny_model("mma")
    batch = tiny_batch(model, batch=1)
    delta = torch.zeros(1, 14, 32)
    delta[0, 9] = 1.0
    for name, expected in (("mma", True), ("prefix_lm", True), ("causal", False)):
        strategy = FUSIONS[name]()
        moved = run(model, batch, delta, strategy)[0] - run(model, batch, torch.zeros_like(delta), strategy)[0]
        assert bool((moved[0, 3:7].abs() > TOLERANCE).any()) is expected


@pytest.mark.parametrize("name", [name for name, strategy in FUSIONS.items() if strategy.shows_future])
def test_loss_on_prompt_tokens_is_refused(name: str) -> None:
    model = tiny_model(name)
    batch = tiny_batch(model)
    batch["labels"][1, 8] = 5
    strategy = FUSIONS[name].__name__
    with pytest.raises(ValueError, match=rf"sample 1, slot 8 supervises a prompt token, but {strategy} lets tokens"):
        model(**batch)
    batch["labels"][1, 8] = -100
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("spec", ["causal", *({"type": name, "layers": []} for name in FUSIONS)], ids=str)
def test_loss_on_prompt_tokens_is_allowed_where_nothing_sees_the_future(spec: Any) -> None:
    model = tiny_model(spec)
    batch = tiny_batch(model)
    batch["labels"] = torch.where(batch["input_ids"] == IMAGE_TOKEN_ID, -100, batch["input_ids"])
    assert int(model(**batch).supervised) == int((batch["labels"][:, 1:] != -100).sum())


def test_every_strategy_says_whether_it_shows_the_future(fusion: str) -> None:
    """`shows_future` must be set whenever a media or prompt token sees a later one: the label check relies on it."""
    tokens = TokenMap.from_layout([("text", 2), ("image", 3), ("text", 2), ("answer", 2), ("text", 1), ("answer", 1)])
    strategy = FUSIONS[fusion]()
    ahead = strategy.visibility(tokens).dense()[0].triu(1)
    assert bool(ahead.any()) or strategy.adjusts_keys == strategy.shows_future
    assert strategy.shows_future or not ahead.any()
    assert not ahead[:, tokens.role[0] == Role.ANSWER].any()
