"""The lmms-eval plugin without lmms-eval: how requests are read. `test_lmms_model` needs it installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.lmms import asked, cut, unpack


def messages(document):
    return [{"role": "user", "content": [
        {"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]}]  # fmt: skip


def test_five_and_six_fields_are_told_apart_by_type():
    six = ("ctx", messages, {"max_new_tokens": 8}, 3, "pope", "test")
    assert unpack(six) == six
    assert unpack(six[1:]) == ("", *six[1:])
    swapped = ("ctx", {"max_new_tokens": 8}, messages, 3, "pope", "test")
    assert unpack(swapped) == six
    with pytest.raises(ConfigError, match=r"requests of \(str, int, str, str\)"):
        unpack(("ctx", 3, "pope", "test"))


def test_messages_become_an_item_with_its_pictures_in_order():
    document = {"image": Image.new("RGBA", (4, 4)), "question": "Is there a dog?"}
    found = asked("q", messages(document), {"max_new_tokens": 8, "until": "\n\n", "temperature": 0})
    assert found.item.messages == ({"role": "user", "content": "<image>\nIs there a dog?"},)
    assert found.media[0].mode == "RGB" and found.max_new_tokens == 8 and found.until == ("\n\n",)
    plain = asked("q", [{"role": "user", "content": "Hello"}], {})
    assert plain.item.messages[0]["content"] == "Hello" and not plain.media and plain.max_new_tokens == 128


def test_what_the_plugin_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"temperature=0\.7"):
        asked("q", [], {"temperature": 0.7})
    with pytest.raises(DataError, match="messages hold 'video'"):
        asked("q", [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], {})
    with pytest.raises(DataError, match="q, image 0: expected a picture"):
        asked("q", messages({"image": "gone.png", "question": ""}), {})


def test_answers_end_at_the_first_stop():
    assert cut("yes\nno", ["o", "\n"]) == "yes" and cut("yes", ["", "x"]) == "yes"


def test_the_plugin_is_announced():
    found = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "mmfuse"]
    if not found:
        pytest.skip("the installed package is older than its entry point")
    assert found[0].value == "mmfuse.eval.lmms:manifests"


def test_a_checkpoint_answers_what_lmms_eval_asks(engine, tmp_path):
    pytest.importorskip("lmms_eval")
    from mmfuse.eval.lmms_model import MmfuseChat

    engine.model.save_pretrained(tmp_path)
    engine.processor.save_pretrained(tmp_path)
    model = MmfuseChat(str(tmp_path), batch_size=2, device="cpu")
    documents = [
        {"image": Image.effect_noise((16, 16), 80 + i), "question": "Is there a " + "1 " * i} for i in range(3)
    ]
    model.task_dict = {"pope": {"test": documents}}
    requests = [
        SimpleNamespace(args=("", messages, {"max_new_tokens": 4 + i % 2}, i, "pope", "test")) for i in range(3)
    ]
    with torch.inference_mode():
        answers = model.generate_until(requests)
    for request, answer, document in zip(requests, answers, documents, strict=True):
        alone = asked("q", messages(document), request.args[2])
        assert engine.generate([alone.item], [alone.media], alone.max_new_tokens)[0].text == answer
