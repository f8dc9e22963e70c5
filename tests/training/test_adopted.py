"""The vision-language model that somebody has: tuned through the command line, and handed back to its own class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmfuse.models import MultimodalLM
from mmfuse.models.adopt.processor import AdoptedProcessor
from mmfuse.testing.vlms import VLMS, tiny_vlm

STEPS = 20


def write_chats(folder: Path, *, turns: int) -> None:
    """Four chats with one or two images, and questions in one turn or two."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(4):
        names = [f"{number}-{place}.png" for place in range(turns)]
        for name in names:
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / name)
        chat = []
        for word in ("cat", "dog")[:turns]:
            chat.append({"role": "user", "content": "<image>what is this ?"})
            chat.append({"role": "assistant", "content": f"a {word}"})
        rows.append({"messages": chat, "images": names})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(vlm: Path, chats: Path, **model: Any) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "stages": [{"name": "tune", "steps": STEPS, "data": {"chats": 1.0}, "lr": {"decoder": 1e-2}}],
        "model": {
            "network": {"vlm": {"pretrained": str(vlm)}},
            "adapter": {"r": 4, "targets": ["decoder.attention", "decoder.mlp"]},
            "optimizer": {"weight_decay": 0.0},
            "max_new_tokens": 4,
            **model,
        },
        "data": {
            "class_path": "MultimodalData",
            "init_args": {
                "train": {"chats": {"path": str(chats / "chats.jsonl")}},
                "test": {"path": str(chats / "chats.jsonl")},
                "batch_size": 2,
            },
        },
        "trainer": {"accelerator": "cpu"},
    }


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "llava")) for f in VLMS])
def test_tuned_exported_and_loaded_by_the_original_class(
    family: str, mmfuse: Callable[..., Any], tmp_path: Path
) -> None:
    vlm, processor = tiny_vlm(family)
    vlm.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    write_chats(tmp_path, turns=1 if family == "paligemma" else 2)
    (tmp_path / "tune.yaml").write_text(json.dumps(config_of(tmp_path / "vlm", tmp_path)))
    ran = mmfuse("fit", "--config", "tune.yaml", "--out", "run")
    assert ran.code == 0, ran.err
    losses = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    column = losses[0].index("train/loss")
    assert float(losses[-1][column]) < float(losses[1][column]) - 0.5
    assert mmfuse("export", "--ckpt", "run", "--out", "adapter").code == 0
    merged = mmfuse("export", "--ckpt", "run", "--merge", "--out", "merged")
    assert merged.code == 0 and type(vlm).__name__ in merged.out

    own = AdoptedProcessor(AutoProcessor.from_pretrained(tmp_path / "vlm"))
    chat = [{"role": "user", "content": "<image>what is this ?"}, {"role": "assistant", "content": "a cat"}]
    batch = own(chat, [Image.open(tmp_path / "0-0.png")], generation=False)
    batch.pop("labels")
    original = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm", dtype=torch.float32).eval()
    with torch.no_grad():
        before = original(**batch).logits
        ours = MultimodalLM.from_vlm(tmp_path / "merged").eval()(**batch).logits
        theirs = PeftModel.from_pretrained(original, tmp_path / "adapter").eval()(**batch).logits
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "merged", dtype=torch.float32, output_loading_info=True
        )
        again = loaded.eval()(**batch).logits
    assert (theirs - before).abs().max() > 0.1
    torch.testing.assert_close(theirs, again, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours, again, rtol=0, atol=1e-4)
    assert not info["missing_keys"] and not info["unexpected_keys"]

    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): value for name, value in load_file(file).items()}, file)
    refused = mmfuse("export", "--ckpt", "run", "--out", "again")
    assert refused.code == 2 and "does not fit the model" in refused.err


def test_packed_through_the_command_line(mmfuse: Callable[..., Any], tmp_path: Path) -> None:
    vlm, processor = tiny_vlm("llava")
    vlm.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    write_chats(tmp_path, turns=2)
    (tmp_path / "0-0.png").write_bytes(b"damaged")
    config = config_of(tmp_path / "vlm", tmp_path)
    config["stages"][0]["steps"] = 2
    del config["data"]["init_args"]["test"]
    config["data"]["init_args"].update(batch_size=1, stream={"pack_to": 100, "lanes": 1, "window": 8}, num_workers=1)
    (tmp_path / "tune.yaml").write_text(json.dumps(config))
    assert mmfuse("fit", "--config", "tune.yaml", "--out", "run", "--checkpoint_every", "1").code == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["MultimodalData"]
    counts = state["counts"]
    assert state["steps"] == 2 and counts["used/chats"] >= 4  # more chats than rows
    assert counts["bad/chats"] >= 1 and "0-0.png" in (tmp_path / "run" / "quarantine.jsonl").read_text()

    config["data"]["init_args"]["stream"] = {"max_tokens": 8, "lanes": 1}
    (tmp_path / "tune.yaml").write_text(json.dumps(config))
    refused = mmfuse("fit", "--config", "tune.yaml", "--out", "again")
    assert refused.code == 2 and "cannot be cut" in refused.err


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("markers", [True, False], ids=["markers", "no markers"])
def test_only_answers_are_taught(family: str, markers: bool) -> None:
    _, own = tiny_vlm(family)
    if not markers:
        for mark in ("{% generation %}", "{% endgeneration %}"):
            own.chat_template = own.chat_template.replace(mark, "")
    processor = AdoptedProcessor(own)
    image = Image.fromarray(np.full((20, 24, 3), 90, dtype=np.uint8))
    one = [{"role": "user", "content": "<image>what is this ?"}, {"role": "assistant", "content": "a cat"}]
    two = [*one, {"role": "user", "content": "<image>and this ?"}, {"role": "assistant", "content": "the dog"}]
    chats, words = ([one], ["a cat"]) if family == "paligemma" else ([one, two], ["a cat", "a cat the dog"])
    samples = [processor.encoder.encode_messages(c, [image] * (len(c) // 2)) for c in chats]
    labels = processor.collate(samples)["labels"]
    for row, expected in zip(labels, words, strict=True):
        said = processor.tokenizer.decode(row[row >= 0], skip_special_tokens=True)
        assert " ".join(said.split()) == expected


def test_mistakes_in_chats() -> None:
    encoder = AdoptedProcessor(tiny_vlm("llava")[1]).encoder
    with pytest.raises(ValueError, match="1 <image> placeholders in the text but 0 images"):
        encoder.encode_messages([{"role": "user", "content": "<image>what ?"}])
    with pytest.raises(ValueError, match="unknown message role 'human'"):
        encoder.encode_messages([{"role": "human", "content": "what ?"}])
    with pytest.raises(ValueError, match="tuned on chats"):
        encoder.encode_document("a cat")


@pytest.mark.slow
def test_compared_under_other_fusions(mmfuse: Callable[..., Any], tmp_path: Path) -> None:
    """One model and adapter, healed under each strategy, in one table."""
    vlm, processor = tiny_vlm("llava")
    vlm.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    write_chats(tmp_path, turns=2)
    config = config_of(tmp_path / "vlm", tmp_path)
    config["stages"][0].update(steps=2, lr={"decoder": 1e-2, "connector": 1e-3, "fusion": 1e-3})
    (tmp_path / "tune.yaml").write_text(json.dumps(config))
    ran = mmfuse("compare", "--config", "tune.yaml", "--fusion", "native,mma,saisa", "--out", "compared")
    assert ran.code == 0, ran.err
    rows = json.loads((tmp_path / "compared" / "compare.json").read_text())["strategies"]
    assert [row["label"] for row in rows] == ["native", "mma", "saisa"]
    flops = {row["label"]: row["scores"]["cost"]["train_flops_per_sample"] for row in rows}
    assert flops["native"] > flops["saisa"] > 0

    config["model"]["network"] = {"decoder": {"model_type": "llama"}}
    (tmp_path / "parts.yaml").write_text(json.dumps(config))
    refused = mmfuse("compare", "--config", "parts.yaml", "--fusion", "native", "--out", "again")
    assert refused.code == 2 and "the config has no network.vlm" in refused.err
