"""MultimodalConfig: what it refuses before any model is built, and its way through JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalConfig
from mmfuse.models.config import DECODER_FAMILIES, decoder_config
from mmfuse.testing import FAMILIES, tiny_model

IMAGE = {
    "encoders": {"image": {"type": "hf"}},
    "connectors": {"image": {"type": "mlp"}},
    "media_token_ids": {"image": 3},
}


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_decoder_config_takes_the_keys_of_its_family(family: str) -> None:
    config = decoder_config({"model_type": family, "hidden_size": 32, "vocab_size": 77, "dtype": "float32"})
    assert (config.model_type, config.hidden_size, config.vocab_size) == (family, 32, 77)
    assert decoder_config(config) is config


def test_every_tested_family_can_be_asked_for() -> None:
    assert set(FAMILIES) == set(DECODER_FAMILIES)


def test_decoder_config_leaves_its_argument_alone() -> None:
    spec = {"model_type": "llama", "hidden_size": 32}
    decoder_config(spec)
    assert spec == {"model_type": "llama", "hidden_size": 32}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model_type": "lama"}, "unknown decoder family (model_type) 'lama': did you mean 'llama'?"),
        ({"hidden_size": 3}, "unknown decoder family (model_type) None"),
        (GPT2Config(), "unknown decoder family 'gpt2'"),
        (
            {"model_type": "llama", "num_hiden_layers": 2},
            "unknown key in decoder 'llama' 'num_hiden_layers': did you mean 'num_hidden_layers'?",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "decoder 'gemma3_text': use_bidirectional_attention is set, which mmfuse does not compute",
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 30.0}, "attn_logit_softcapping is set"),
    ],
)
def test_decoder_config_refuses(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        decoder_config(spec)
    with pytest.raises(ConfigError, match=re.escape(message)):
        MultimodalConfig(text_config=spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoders": {"imgae": {}}}, "unknown modality 'imgae': did you mean 'image'? Known: audio, eeg, image"),
        ({"connectors": {"text": {}}}, "unknown modality 'text'"),
        (
            {"connectors": {}},
            "encoders, connectors and media_token_ids must name the same modalities, got ['image'], [], ['image']",
        ),
        ({"media_token_ids": {"image": 3, "audio": 4}}, "got ['image'], ['image'], ['audio', 'image']"),
    ],
)
def test_modalities_must_be_known_and_agree(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MultimodalConfig(**{**IMAGE, **changes})


def test_defaults() -> None:
    config = MultimodalConfig()
    assert config.text_config.model_type == "llama"
    assert (config.fusion, config.encoders, config.attention_backend) == ("causal", {}, "auto")
    assert MultimodalConfig(text_config=LlamaConfig(eos_token_id=9)).eos_token_id == 9
    assert MultimodalConfig(text_config=LlamaConfig(eos_token_id=9), eos_token_id=8).eos_token_id == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_goes_through_json_unchanged(family: str, tmp_path: Path) -> None:
    config = tiny_model({"type": "mma", "layers": [0]}, family).config
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "mmfuse"
    assert written["text_config"]["model_type"] == family
    assert written["fusion"] == {"type": "mma", "layers": [0]}
    for loaded in (MultimodalConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MultimodalConfig
        ignored = {"transformers_version", "_name_or_path"}
        one, other = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, loaded))
        assert one == other
