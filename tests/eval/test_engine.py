from __future__ import annotations

import pytest
import torch

from mmfuse.eval.engine import answer_logprobs, weights_digest
from mmfuse.eval.tasks.items import Request
from mmfuse.fusion import FUSIONS
from mmfuse.testing import tiny_model


@pytest.mark.parametrize("fusion", ["causal", "mma"])
def test_likelihoods_are_the_models_own_loss(make_engine, fusion, small_task, decoded):
    engine = make_engine(fusion)
    task = small_task(4, Request.RANK)
    for item, found in zip(task.items, engine.likelihoods(task.items, decoded(task.items)), strict=True):
        for option, logprob, count in zip(item.options, found.logprobs, found.tokens, strict=True):
            messages = [*item.messages, {"role": "assistant", "content": option}]
            batch = engine.processor(messages, decoded([item])[0])
            with torch.inference_mode():
                output = engine.model(**batch)
            assert int(output.supervised) == count
            assert logprob == pytest.approx(-float(output.loss) * count, abs=1e-4)


def test_only_the_last_answer_of_a_dialogue_counts(make_engine, small_task, decoded):
    engine = make_engine("causal")
    (item,) = small_task(1, Request.RANK).items
    shown = (*item.messages, {"role": "assistant", "content": "35"}, {"role": "user", "content": "Is there a 3?"})
    longer = type(item)("q", shown, item.media, "yes", options=item.options)
    (found,) = engine.likelihoods([longer], decoded([longer]))
    (short,) = engine.likelihoods([item], decoded([item]))
    assert found.tokens == short.tokens and found.logprobs != short.logprobs


def test_an_answers_log_probability_and_margin_are_those_of_its_tokens(make_engine, small_task, decoded):
    engine = make_engine("mma")
    task = small_task(3)
    for item, found in zip(task.items, engine.generate(task.items, decoded(task.items), 5), strict=True):
        prompt = engine.processor(list(item.messages), decoded([item])[0], generation=True)
        made = engine.model.generate(
            **prompt, max_new_tokens=5, do_sample=False, eos_token_id=engine._ends, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        top = torch.stack(made.logits, dim=1)[0].log_softmax(-1).topk(2, dim=-1).values
        assert found.tokens == len(top) and not found.finished
        assert found.logprob == pytest.approx(float(top[:, 0].sum()), abs=1e-4)
        assert found.margin == pytest.approx(float((top[:, 0] - top[:, 1]).min()), abs=1e-4)


def test_lengths_are_those_of_the_rows_that_are_run(make_engine, small_task, decoded):
    engine = make_engine("causal")
    (item,) = small_task(1, Request.RANK).items
    messages = list(item.messages)
    images = decoded([item])[0]
    assert engine.lengths(item, Request.GENERATE) == [
        engine.processor(messages, images, generation=True)["input_ids"].shape[1]
    ]
    answers = [[*messages, {"role": "assistant", "content": option}] for option in item.options]
    assert engine.lengths(item, Request.RANK) == [
        engine.processor(answer, images)["input_ids"].shape[1] for answer in answers
    ]


def test_the_prompt_is_what_the_model_reads(make_engine, small_task):
    engine = make_engine("causal")
    (item,) = small_task(1).items
    encoded = engine.processor.encoder.encode_messages(item.messages, [None], generation=True)
    expected = engine.processor.tokenizer.decode(encoded.input_ids)
    visual = engine.model.visual_tokens()
    assert engine.prompt(item) == expected.replace("<image>" * visual, "<image>")


def test_the_log_probabilities_of_answers_are_picked_by_hand():
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    ids = torch.tensor([[9, 2, 0]])
    found = answer_logprobs(logits, ids, torch.tensor([[False, False, True]]))
    assert found.tolist() == [[0.0, pytest.approx(float(logits[0, 1].log_softmax(0)[0]))]]
    found = answer_logprobs(logits, ids, torch.tensor([[False, True, True]]))
    assert found[0, 0] == pytest.approx(float(logits[0, 0].log_softmax(0)[2]))


def test_the_identity_changes_with_weights_fusion_and_format_and_nothing_else(make_engine):
    engine = make_engine("causal")
    first, other = engine.identity(), make_engine("mma").identity()
    assert first["fusion"] == "causal" and first == engine.identity()
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {"fusion", "config"}
    model = tiny_model("causal")
    before = weights_digest(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert weights_digest(model) != before
    assert weights_digest(tiny_model("causal")) == before


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_batch_size_and_order_change_nothing(make_engine, fusion, small_task, decoded):
    """Log-likelihoods within 1e-4; answers are equal but for listed near-ties."""
    engine = make_engine(fusion)
    items = small_task(8, Request.RANK).items
    media = decoded(items)
    together = engine.likelihoods(items, media)
    backwards = engine.likelihoods(items[::-1], media[::-1])[::-1]
    answers = engine.generate(items, media, 4)
    near_ties = {item.id for item, answer in zip(items, answers, strict=True) if answer.margin < 1e-4}
    assert len(near_ties) <= 1
    for number, item in enumerate(items):
        (alone,) = engine.likelihoods([item], [media[number]])
        for other in (together[number], backwards[number]):
            assert other.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        (answer,) = engine.generate([item], [media[number]], 4)
        assert answer.text == answers[number].text or item.id in near_ties
