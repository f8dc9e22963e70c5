"""From the lines of a YAML to a model and its processor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig

from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.errors import ConfigError
from mmfuse.fusion import ModalityMutual
from mmfuse.models import MultimodalLM, MultimodalProcessor, NetworkSpec, build_network

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TALK = [{"role": "user", "content": "<image>What is 3?"}, {"role": "assistant", "content": "35"}]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def spec(decoder: dict[str, Any] | None = None, **changes: Any) -> NetworkSpec:
    parts: dict[str, Any] = {
        "decoder": {"model_type": "llama", **SIZES, **(decoder or {})},
        "encoders": {"image": {"type": "hf", "config": VISION}},
        "connectors": {"image": {"type": "linear"}},
        "fusion": "mma",
        **changes,
    }
    return NetworkSpec(**parts)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A decoder's folder, with a vocabulary that is smaller than the tokenizer's."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **SIZES))
    model.save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def test_model_and_processor_fit_each_other(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    model, processor = build_network(spec(), tokenizer)
    assert isinstance(model.fusion, ModalityMutual)
    assert model.config.text_config.vocab_size == len(tokenizer) == 352
    assert model.config.media_token_ids == {"image": 7}
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 6)
    assert processor.visual_tokens == model.visual_tokens() == 4
    batch = processor(TALK, [PICTURE])
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    logits = model.eval()(**batch).logits
    assert logits.shape == (1, 16, 352)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, feeds = MultimodalLM.from_pretrained(tmp_path), MultimodalProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(**feeds(TALK, [PICTURE])).logits, logits)


def test_modalities_get_their_placeholders_and_features(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    audio = {"type": "precomputed", "hidden_size": 5, "num_tokens": 6}
    made = spec()
    model, processor = build_network(
        spec(
            encoders={"audio": audio, **made.encoders},
            connectors={"audio": {"type": "perceiver", "num_latents": 2}, **made.connectors},
        ),
        tokenizer,
    )
    assert tokenizer.convert_tokens_to_ids("<audio>") == 352
    assert model.config.text_config.vocab_size == len(tokenizer) == 353
    assert model.config.media_token_ids == {"audio": 352, "image": 7}
    assert (processor.media_tokens, processor.feature_shapes) == ({"audio": 2, "image": 4}, {"audio": [6, 5]})
    talk = [{"role": "user", "content": "<image><audio>What is 3?"}, *TALK[1:]]
    batch = processor(talk, [PICTURE], [torch.randn(6, 5)])
    logits = model.eval()(**batch).logits

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, feeds = MultimodalLM.from_pretrained(tmp_path), MultimodalProcessor.from_pretrained(tmp_path)
    again = feeds(talk, [PICTURE], [batch["audio_features"][0]])
    assert torch.equal(loaded(**again).logits, logits)


def test_a_model_needs_no_tower(tmp_path: Path) -> None:
    image = {"type": "precomputed", "hidden_size": 5, "num_tokens": 4, "grid": [2, 2]}
    made = spec(encoders={"image": image}, connectors={"image": {"type": "pixel_shuffle"}})
    model, processor = build_network(made, load_tokenizer())
    assert processor.visual_tokens == model.visual_tokens() == 1
    batch = processor(TALK, [torch.randn(4, 5)])
    assert list(batch["image_features"].shape) == [1, 4, 5]
    assert torch.isfinite(model(**batch).loss)
    processor.save_pretrained(tmp_path)
    assert MultimodalProcessor.from_pretrained(tmp_path).feature_shapes == {"image": [4, 5]}


def test_the_processor_normalises_as_the_encoder_wants() -> None:
    clip = {"type": "hf", "config": {**VISION, "model_type": "clip_vision_model"}}
    model, processor = build_network(spec(encoders={"image": {**clip, "image_size": [16, 24]}}), load_tokenizer())
    assert model.visual_tokens() == 6
    batch = processor(TALK, [PICTURE])
    assert batch["pixel_values"].shape == (1, 3, 16, 24)
    assert list(processor.image_processor.image_mean) == list(model.encoders["image"].image_mean)
    assert processor.image_processor.image_mean[0] != 0.5
    assert torch.isfinite(model(**batch).loss)


def test_a_bare_tokenizer_gets_what_is_missing() -> None:
    tokenizer = load_tokenizer()
    tokenizer.pad_token = None
    model, processor = build_network(spec(), tokenizer)
    assert tokenizer.pad_token == "<|end|>"
    assert model.config.pad_token_id == 6
    assert processor.tokenizer is tokenizer


def test_an_image_token_is_added_to_a_tokenizer_without_one() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", "<unk>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<|pad|>", eos_token="<|end|>"
    )
    model, processor = build_network(spec(), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<image>") == 6
    assert model.config.media_token_ids == {"image": 6}
    assert model.config.text_config.vocab_size == len(tokenizer) == 7
    assert tokenizer.convert_tokens_to_ids("<|end|>") == 5
    assert processor.encoder.encode_messages([{"role": "user", "content": "<image>"}], [PICTURE]).images == [PICTURE]


def test_chat_format_and_backend_reach_their_place() -> None:
    chat, backend = {"user": "<|user|>\n"}, "reference"
    model, processor = build_network(spec(chat_format=chat, attention_backend=backend), load_tokenizer())
    assert processor.chat_format["user"] == "<|user|>\n"
    assert model.config.attention_backend == "reference"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (spec({"vocab_size": 351}), "decoder vocab_size is 351, but the tokenizer has 352 tokens; leave it out"),
        (spec({"hiden_size": 8}), "unknown key in decoder 'llama' 'hiden_size': did you mean 'hidden_size'?"),
        (spec(encoders={"imag": {"type": "hf"}}), "unknown modality 'imag': did you mean 'image'?"),
        (spec(fusion="mmma"), "unknown fusion 'mmma': did you mean 'mma'?"),
        (spec(chat_format={"usr": "x"}), "unknown key in chat_format 'usr': did you mean 'user'?"),
    ],
)
def test_building_refuses(made: NetworkSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_network(made, load_tokenizer())


# A decoder with weights of its own


def test_a_key_that_no_class_reads_is_left_behind(checkpoint: Path, tmp_path: Path) -> None:
    config = checkpoint / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_model_name_or_path": "a name from GGUF"}))
    model, _ = build_network(_pretrained(checkpoint), load_tokenizer())
    model.save_pretrained(tmp_path / "whole")
    loaded = MultimodalLM.from_pretrained(tmp_path / "whole")
    assert "_model_name_or_path" not in loaded.config.text_config.to_dict()


def test_a_pretrained_decoder_keeps_its_weights_and_grows(checkpoint: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(checkpoint)
    model, processor = build_network(_pretrained(checkpoint), load_tokenizer())
    assert model.get_input_embeddings().weight.shape == (352, 32)
    assert torch.equal(model.get_input_embeddings().weight[:300], original.get_input_embeddings().weight)
    ids = torch.randint(10, 300, (2, 9))
    logits = model.eval()(ids).logits
    torch.testing.assert_close(logits[..., :300], original(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert model.config.text_config.vocab_size == 352

    batch = processor(TALK, [PICTURE])
    model.save_pretrained(tmp_path / "whole")
    loaded = MultimodalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def _pretrained(checkpoint: Path, **settings: Any) -> NetworkSpec:
    made = spec()
    return NetworkSpec({"pretrained": str(checkpoint), **settings}, made.encoders, made.connectors, made.fusion)


def test_settings_beside_a_checkpoint_must_agree_with_it(checkpoint: Path) -> None:
    build_network(_pretrained(checkpoint, hidden_size=32, model_type="llama"), load_tokenizer())
    message = f"decoder: hidden_size is 64 in the config and 32 in {checkpoint}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_network(_pretrained(checkpoint, hidden_size=64), load_tokenizer())


def test_the_meta_device_needs_no_weights() -> None:
    tokenizer = load_tokenizer()
    with torch.device("meta"):
        model, _ = build_network(_pretrained(Path("/nowhere"), model_type="llama", **SIZES), tokenizer)
    assert all(weight.is_meta for weight in model.parameters())
    real, _ = build_network(spec(), tokenizer)
    assert sum(w.numel() for w in model.parameters()) == sum(w.numel() for w in real.parameters())
