from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmfuse.data import Sample, encode_sample, split_answer
from mmfuse.data.handwriting_shards import Handwriting, samples
from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.eval import Prediction, answer_questions, normalise, plain_image
from mmfuse.models import NetworkSpec, build_network
from mmfuse.models.build import processor_for
from mmfuse.models.media import Features
from mmfuse.testing import tiny_model


@pytest.fixture(scope="module")
def network():
    tokenizer = load_tokenizer()
    model = tiny_model("mma", vocab_size=len(tokenizer))
    return model, processor_for(model, tokenizer)


@pytest.fixture(scope="module")
def questions():
    return [
        Sample(
            key=record["key"],
            images=tuple(Image.fromarray(image) for image in record["images"]),
            messages=tuple(record["messages"]),
            text=None,
            info={"family": record["family"], "targets": record["targets"]},
        )
        for record in samples(Handwriting(test=30), "test")
    ]


def dialogue(*texts, images=(), **info):
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))
    return Sample(key="chat", images=images, messages=messages, text=None, info=info)


def test_predictions_are_those_of_each_question_alone_in_the_order_asked(network, questions):
    model, processor = network
    found = answer_questions(model, processor, questions, batch_size=7, max_new_tokens=6)
    assert [item.key for item in found] == [sample.key for sample in questions]
    assert [item.index for item in found] == list(range(len(questions)))
    assert [item.answer for item in found] == [sample.info["targets"][-1] for sample in questions]
    assert [item.family for item in found] == [sample.info["family"][-1] for sample in questions]
    assert len({item.prediction for item in found}) > 5, "a model that always says the same would pass this test"
    for sample, item in list(zip(questions, found, strict=True))[:8]:
        prompt = encode_sample(split_answer(sample)[0], processor.encoder, generation=True)
        batch = processor.collate([prompt], side="left", supervised=False)
        made = model.generate(**batch, do_sample=False, max_new_tokens=6, eos_token_id=[2, 6], pad_token_id=0)
        text = processor.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True).strip()
        assert item.prediction == text


@pytest.mark.parametrize("batch_size", [1, 30, 1000])
def test_the_batch_size_changes_nothing(network, questions, batch_size):
    expected = answer_questions(*network, questions, batch_size=4, max_new_tokens=5)
    assert answer_questions(*network, questions, batch_size=batch_size, max_new_tokens=5) == expected


def test_question_text_is_the_last_one_without_placeholders(network):
    image = Image.new("L", (16, 16))
    sample = dialogue(
        "<image>\nIs there a 3?", "no", "Is there a 4?", " yes ", images=(image,), family=["exists", "last"]
    )
    (found,) = answer_questions(*network, [sample], max_new_tokens=2)
    assert (found.question, found.answer, found.family) == ("Is there a 4?", "yes", "last")
    first = dialogue("<image>\nIs there a 3?", "no", images=(image,))
    (found,) = answer_questions(*network, [first], max_new_tokens=2)
    assert (found.question, found.answer, found.family) == ("Is there a 3?", "no", "all")


def test_earlier_turns_stay_in_the_prompt(network):
    image = Image.new("L", (16, 16), 90)
    texts = [("<image>\nIs there a 3?", answer, "Is there a 4?", "yes") for answer in ("no", "yes", "7")]
    asked = [dialogue(*turns, images=(image,)) for turns in texts]
    given = {item.prediction for item in answer_questions(*network, asked, max_new_tokens=6)}
    assert len(given) > 1


def test_text_questions_and_images_may_be_mixed(network, questions):
    model, processor = network
    asked = [dialogue("Is there a 3?", "no"), questions[1], dialogue("Read all digits.", "1"), questions[0]]
    together = answer_questions(model, processor, asked, max_new_tokens=4)
    alone = [answer_questions(model, processor, [sample], max_new_tokens=4)[0] for sample in asked]
    assert [item.prediction for item in together] == [item.prediction for item in alone]


def test_answers_end_where_the_model_ends_them(network, questions):
    model, processor = network
    long = next(item for item in answer_questions(model, processor, questions, max_new_tokens=4) if not item.finished)
    asked = questions[long.index]
    prompt = encode_sample(split_answer(asked)[0], processor.encoder, generation=True)
    batch = processor.collate([prompt], side="left", supervised=False)
    second = int(model.generate(**batch, do_sample=False, max_new_tokens=2)[0, -1])
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = second
    try:
        (cut,) = answer_questions(model, processor, [asked], max_new_tokens=4)
    finally:
        model.generation_config.eos_token_id = kept
    assert cut.finished
    assert long.prediction.startswith(cut.prediction) and len(cut.prediction) < len(long.prediction)


def test_generation_settings_of_the_checkpoint_do_not_change_the_answers(network, questions):
    model, processor = network
    expected = answer_questions(model, processor, questions[:6], max_new_tokens=8)
    config = model.generation_config
    settings = {"do_sample": True, "num_beams": 2, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    before = {name: getattr(config, name) for name in settings}
    config.update(**settings)
    try:
        assert answer_questions(model, processor, questions[:6], max_new_tokens=8) == expected
        assert config.do_sample is True and config.num_beams == 2
    finally:
        config.update(**before)


def test_blind_answers_are_those_to_plain_images(network, questions):
    plain = []
    for sample in questions:
        (image,) = sample.images
        flat = Image.new("L", image.size, round(np.asarray(image).mean()))
        plain.append(replace(sample, images=(flat,)))
    seen = answer_questions(*network, questions, max_new_tokens=4)
    blind = answer_questions(*network, questions, max_new_tokens=4, blind=True)
    assert blind == answer_questions(*network, plain, max_new_tokens=4)
    assert [item.prediction for item in blind] != [item.prediction for item in seen]
    assert [item.question for item in blind] == [item.question for item in seen]


def test_blind_features_are_their_mean_in_every_token():
    tokenizer = load_tokenizer()
    decoder = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}
    audio = {"type": "precomputed", "hidden_size": 2, "num_tokens": 3}
    spec = NetworkSpec(
        decoder={**decoder, "num_hidden_layers": 1, "num_attention_heads": 4},
        encoders={"audio": audio},
        connectors={"audio": {"type": "linear"}},
    )
    model, processor = build_network(spec, tokenizer)
    clips = [Features.of(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 7.0]]), "a"), np.ones((3, 2), np.float32)]
    turns = ({"role": "user", "content": "<audio>7?<audio>"}, {"role": "assistant", "content": "yes"})
    sample = Sample("s", (), turns, None, {}, audio=tuple(clips))
    given = []
    model.encoders["audio"].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    (prediction,) = answer_questions(model, processor, [sample], max_new_tokens=1, blind=True)
    assert prediction.question == "7?"
    assert given[0].tolist() == [[[2.0, 3.0]] * 3, [[1.0, 1.0]] * 3]


def test_every_module_gets_its_own_mode_back(network, questions):
    model, processor = network
    seen = []
    hook = model.decoder.register_forward_pre_hook(lambda *_: None)
    layer = model.decoder.model.layers[0]
    watch = layer.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.train()
    model.connectors.eval()
    try:
        answer_questions(model, processor, questions[:2], max_new_tokens=2)
        assert seen and not any(seen)
        assert model.training and layer.training and not model.connectors.training
        with pytest.raises(ZeroDivisionError):
            answer_questions(model, processor, questions[:2], max_new_tokens=2, progress=lambda *_: 1 / 0)
        assert model.training and layer.training and not model.connectors.training
    finally:
        hook.remove()
        watch.remove()
        model.eval()


def test_progress_counts_up_to_all_questions(network, questions):
    calls = []
    answer_questions(*network, questions[:5], batch_size=2, max_new_tokens=1, progress=lambda *now: calls.append(now))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_no_questions_give_no_predictions(network):
    assert answer_questions(*network, []) == []


def test_no_gradients_are_kept(network, questions):
    model, processor = network
    answer_questions(model, processor, questions[:2], max_new_tokens=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_mistakes_name_the_sample(network, questions):
    document = Sample("doc-7", questions[0].images, None, "<image>12 34", {})
    with pytest.raises(ValueError, match="doc-7"):
        answer_questions(*network, [questions[0], document])
    monologue = Sample("mono-1", (), ({"role": "assistant", "content": "hello"},), None, {})
    with pytest.raises(ValueError, match="mono-1: the last answer follows no question"):
        answer_questions(*network, [monologue])
    with pytest.raises(ValueError, match="batch_size and max_new_tokens must be at least 1, got 0 and 32"):
        answer_questions(*network, questions, batch_size=0)


@pytest.mark.parametrize(("mode", "size"), [("L", (16, 8)), ("RGB", (5, 7)), ("P", (4, 4))])
def test_a_plain_image_has_the_size_and_the_mean_of_the_image(mode, size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    plain = plain_image(image)
    colours = np.asarray(image if mode == "L" else image.convert("RGB"))
    assert plain.size == image.size
    assert np.unique(np.asarray(plain).reshape(size[0] * size[1], -1), axis=0).shape[0] == 1
    np.testing.assert_array_equal(np.asarray(plain)[0, 0], np.rint(colours.mean(axis=(0, 1))))


def test_a_plain_array_keeps_shape_and_dtype():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    plain = plain_image(pixels)
    assert plain.shape == pixels.shape and plain.dtype == np.uint8
    assert (plain == np.array([22, 24, 24])).all() or (plain == np.array([22, 23, 24])).all()


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        ("35 71", " 35  71\n", True),
        ("Yes", "yes", True),
        ("Straße", "STRASSE", True),
        ("35 71", "3571", False),
        ("yes", "yes.", False),
        ("two", "2", False),
        ("no", "", False),
    ],
)
def test_what_counts_as_right(answer, prediction, right):
    assert Prediction("k", "f", "q", answer, prediction, 0).right is right
    assert normalise(normalise(prediction)) == normalise(prediction)
