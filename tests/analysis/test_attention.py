from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mmfuse.analysis import attention_examples, attention_to_image, visual_grid
from mmfuse.data import Sample
from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.models import MultimodalLM
from mmfuse.models.build import processor_for
from mmfuse.sequence import Modality
from mmfuse.testing import tiny_batch, tiny_model

LAYOUT = [("text", 2), ("image", 4), ("text", 5), ("answer", 3)]
LATER = [("text", 1), ("image", 4), ("text", 3), ("answer", 2), ("text", 3), ("image", 4), ("text", 2), ("answer", 1)]


def recorded(model, batch):
    """Head means of every layer, `[L, B, S, S]`, by the plain forward pass."""
    held = {}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model(**inputs, record=lambda layer, weights: held.__setitem__(layer, weights.detach().mean(1)))
    return torch.stack([held[layer] for layer in sorted(held)])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("fusion", ["causal", "mma"])
def test_maps_are_the_recorded_weights_of_the_rows_that_predict_answers(fusion, family):
    model = tiny_model(fusion, family)
    batch = tiny_batch(model, LAYOUT, batch=2)
    weights = recorded(model, batch)
    found = attention_to_image(model, batch)
    assert found.layers == (0, 1) and found.grid == (2, 2) and len(found.samples) == 2
    for row, sample in enumerate(found.samples):
        assert sample.to_image.shape == (2, 3, 4)
        # Text 2, image 4, text 5: the last prompt token at slot 10 predicts the first answer token.
        assert_close(sample.to_image, weights[:, row, 10:13, 2:6])
        assert_close(sample.question_to_image, weights[:, row, 6:11, 2:6].sum(-1).mean(-1))
        assert_close(sample.image_to_question, weights[:, row, 2:6, 6:11].sum(-1).mean(-1))
        assert sample.answer_ids.tolist() == batch["input_ids"][row, 11:14].tolist()
        assert bool((sample.to_image.sum(-1) <= 1 + 1e-5).all())


def test_images_attend_to_the_question_under_mma_alone():
    for fusion, attends in (("causal", False), ("mma", True)):
        model = tiny_model(fusion)
        found = attention_to_image(model, tiny_batch(model, LAYOUT))
        mass = torch.stack([sample.image_to_question for sample in found.samples])
        assert bool((mass > 0.05).all()) if attends else bool((mass == 0).all())


def test_only_the_question_of_an_images_own_turn_counts():
    model = tiny_model("mma")
    batch = tiny_batch(model, [LATER])
    weights = recorded(model, batch)[:, 0]
    (sample,) = attention_to_image(model, batch).samples
    first = weights[:, 1:5, 5:8].sum(-1)
    second = weights[:, 13:17, 17:19].sum(-1)
    assert_close(sample.image_to_question, torch.cat([first, second], dim=1).mean(1))
    images = list(range(1, 5)) + list(range(13, 17))
    assert_close(sample.to_image, weights[:, [7, 8, 18]][..., images])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_company_change_nothing(side):
    model = tiny_model("mma")
    other = [("image", 4), ("text", 9), ("answer", 6)]
    batch, single = tiny_batch(model, [LAYOUT, other], side=side), tiny_batch(model, [LAYOUT])
    single["pixel_values"] = batch["pixel_values"][:1]
    together, alone = attention_to_image(model, batch), attention_to_image(model, single)
    assert_close(together.samples[0].to_image, alone.samples[0].to_image)
    assert_close(together.samples[0].image_to_question, alone.samples[0].image_to_question)
    assert together.samples[1].to_image.shape == (2, 6, 4)


def test_chosen_layers_come_in_the_order_asked():
    model = tiny_model("mma")
    batch = tiny_batch(model, LAYOUT)
    every = attention_to_image(model, batch)
    some = attention_to_image(model, batch, layers=[1, 0])
    assert some.layers == (1, 0)
    assert_close(some.samples[0].to_image, every.samples[0].to_image.flip(0))
    for layers in ([2], [-1], []):
        with pytest.raises(ValueError, match=r"layers must name some of 0\.\.1"):
            attention_to_image(model, batch, layers=layers)


def test_without_text_behind_the_image_there_is_no_mass_to_speak_of():
    model = tiny_model("mma")
    (sample,) = attention_to_image(model, tiny_batch(model, [[("text", 3), ("image", 4), ("answer", 2)]])).samples
    assert bool(sample.question_to_image.isnan().all()) and bool(sample.image_to_question.isnan().all())
    assert bool(sample.to_image.isfinite().all())


def test_the_mode_is_kept_and_no_gradient_built():
    model = tiny_model("mma")
    model.train()
    model.decoder.eval()
    found = attention_to_image(model, tiny_batch(model, LAYOUT))
    assert model.training and model.connectors.training and not model.decoder.training
    assert not found.samples[0].to_image.requires_grad


def test_a_sample_without_image_or_answer_is_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="sample 1 has no image"):
        attention_to_image(model, tiny_batch(model, [LAYOUT, [("text", 3), ("answer", 2)]]))
    with pytest.raises(ValueError, match="sample 0 has no answer"):
        attention_to_image(model, tiny_batch(model, [[("image", 4), ("text", 3)]]))


def test_packed_rows_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="this batch is packed"):
        attention_to_image(model, tiny_batch(model, LAYOUT, pack=True))


def test_a_resampler_has_no_grid():
    config = tiny_model().config
    config.connectors = {"image": {"type": "avg_pool", "output_size": 1}}
    model = MultimodalLM(config).eval()
    batch = tiny_batch(model, [("image", 1), ("text", 2), ("answer", 2)])
    with pytest.raises(ValueError, match="AvgPoolConnector gives 1 visual tokens, but the encoder's grid has 2 × 2"):
        attention_to_image(model, batch)
    assert visual_grid(tiny_model()) == (2, 2)
    with pytest.raises(ValueError, match="no attention maps: the model takes no images, only audio"):
        visual_grid(tiny_model(modalities=("audio",)))


@pytest.fixture(scope="module")
def network():
    tokenizer = load_tokenizer()
    model = tiny_model("mma", vocab_size=len(tokenizer))
    return model, processor_for(model, tokenizer)


def chat(*texts, images, key="chat"):
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))
    return Sample(key=key, images=images, messages=messages, text=None, info={})


def test_examples_show_the_last_answer_over_the_last_image(network):
    model, processor = network
    first, second = Image.new("L", (16, 16), 30), Image.new("L", (16, 16), 200)
    sample = chat("<image>\nIs there a 3?", "no", "<image>\nRead all digits.", "35 71", images=(first, second))
    (example,) = attention_examples(model, processor, [sample])
    assert example.image is second and example.question == "Read all digits." and example.layers == (0, 1)
    assert "".join(example.tokens) == "35 71"
    assert example.maps.shape == (2, len(example.tokens), 2, 2)
    batch = processor.collate([processor.encoder.encode_messages(sample.messages, sample.images)])
    weights = recorded(model, batch)[:, 0]
    image = (batch["tokens"].modality[0] == Modality.IMAGE).nonzero().flatten()[-4:]
    # The rows before each token; the last answer token of the sample only closes the message.
    rows = range(len(batch["input_ids"][0]) - len(example.tokens) - 2, len(batch["input_ids"][0]) - 2)
    assert_close(example.maps.flatten(2), weights[:, list(rows)][..., image])


def test_examples_of_what_the_model_said(network):
    image = Image.new("L", (16, 16), 30)
    asked = [chat("<image>\nIs there a 3?", "no", images=(image,), key=key) for key in "ab"]
    given = attention_examples(*network, asked, answers=["yes", "no"])
    assert [(item.key, "".join(item.tokens)) for item in given] == [("a", "yes"), ("b", "no")]
    with pytest.raises(ValueError, match="shorter"):
        attention_examples(*network, asked, answers=["yes"])
    open_end = chat("<image>\nIs there a 3?", images=(image,), key="open-1")
    with pytest.raises(ValueError, match="open-1: the sample ends with no answer"):
        attention_examples(*network, [open_end], answers=["yes"])


def test_an_adopted_model_has_no_known_grid() -> None:
    with pytest.raises(ValueError, match="an adopted model's tokens lie in the image is not known"):
        visual_grid(tiny_model(family="llava"))
