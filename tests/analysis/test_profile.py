"""What the profiler counts without data against the same model with data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmfuse.analysis.profile import attention_flops, cache_bytes, profile_model, training_flops, without_data
from mmfuse.analysis.workload import Workload, copy_with, workload_tokens
from mmfuse.errors import ConfigError
from mmfuse.fusion import FUSIONS, DecoderShape
from mmfuse.fusion.base import base_visibility
from mmfuse.fusion.flops import text_stream_flops
from mmfuse.models import MultimodalLM
from mmfuse.sequence import TokenMap
from mmfuse.testing import FAMILIES, tiny_model

TEXT, VISUAL, BATCH = 8, 4, 2
LENGTH = TEXT + VISUAL


def workload(model: MultimodalLM) -> Workload:
    return Workload.random(model, workload_tokens(model, TEXT, VISUAL, BATCH))


def measured_flops(model: MultimodalLM) -> int:
    """What torch counts while the model really runs; fused attention on a CPU escapes it, so it is written out."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        workload(model).run(model)
    return int(counter.get_total_flops())


def convention(model: MultimodalLM) -> int:
    return BATCH * model.fusion.convention_flops(DecoderShape.of(model.config.text_config), TEXT, VISUAL)


# FLOPs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_flops_executed_are_those_of_the_model_that_runs(fusion: str, family: str) -> None:
    model = tiny_model(fusion, family)
    model.config.attention_backend = "reference"
    profile = profile_model(model, TEXT, VISUAL, batch=BATCH)
    assert profile.executed_flops == measured_flops(model)
    assert profile.convention_flops == convention(model)
    difference = profile.executed_flops - profile.convention_flops
    if fusion == "saisa":
        # The projector of the first layer is the model's connector.
        assert difference == -BATCH * 2 * VISUAL * 16 * 32
    elif fusion == "composite":
        # Behind the last layer nobody reads media, so it does not update them.
        shape = DecoderShape.of(model.config.text_config)
        updated, plain = (text_stream_flops(shape, TEXT, VISUAL, value_output=on, ffn=on) for on in (True, False))
        assert difference == -BATCH * (updated - plain)
    elif fusion == "moda":
        # Aligned keys are computed for all tokens in both directions, and kept where they belong.
        assert difference > 0
    else:
        assert difference == 0


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fused_attention_does_less_only_where_all_is_causal(fusion: str) -> None:
    model = tiny_model(fusion)
    profile = profile_model(model, TEXT, VISUAL, batch=BATCH)
    # Two layers of four heads of width 8, over the tokens that the sequence holds.
    length = {"causal": LENGTH, "cross_attention": TEXT}.get(fusion, 0)
    above_the_diagonal = length * (length - 1) // 2
    assert measured_flops(model) - profile.executed_flops == 2 * BATCH * 4 * 4 * 8 * above_the_diagonal


def test_pairs_of_an_attention() -> None:
    causal = base_visibility(TokenMap.from_layout([("text", 5)]).repeat(3))
    assert attention_flops(causal, 2, 8, "sdpa") == 4 * 2 * 8 * 3 * 15
    assert attention_flops(causal, 2, 8, "reference") == 4 * 2 * 8 * 3 * 25
    assert attention_flops(causal.rows(4), 2, 8, "auto") == 4 * 2 * 8 * 3 * 5
    assert attention_flops(causal.rows(2), 2, 8, "auto") == 4 * 2 * 8 * 3 * 15
    assert attention_flops(causal, 2, 8, "sdpa", with_mass=True) == 4 * 2 * 9 * 3 * 5 * 6
    assert attention_flops(causal, 2, 8, "rectangles") == 4 * 2 * 8 * 3 * 15
    assert attention_flops(causal, 2, 8, "flex") == 4 * 2 * 8 * 3 * 25
    packed = base_visibility(TokenMap.pack([TokenMap.from_layout([("text", 512)])] * 4))
    assert attention_flops(packed, 16, 64, "sdpa") == 4 * 16 * 64 * 2048**2
    assert attention_flops(packed, 16, 64, "auto") == 4 * 16 * 64 * 4 * 512 * 513 // 2
    with pytest.raises(ValueError, match="unknown cost of attention backend 'sdqa': did you mean 'sdpa'"):
        attention_flops(causal, 2, 8, "sdqa")


def test_training_is_three_forward_passes() -> None:
    model = tiny_model("mma").train()
    model.config.attention_backend = "reference"
    work = Workload.random(model, workload_tokens(model, TEXT, VISUAL))
    with FlopCounterMode(display=False) as counter:
        work.embeds.requires_grad_()
        work.run(model).sum().backward()
    assert training_flops(model, TEXT, VISUAL) == counter.get_total_flops()


def test_encoder_connector_and_head_are_counted_apart() -> None:
    profile = profile_model(tiny_model("mma"), TEXT, VISUAL, batch=BATCH)
    # SigLIP of one layer: 4 patches of 3·8·8 pixels, width 16, feed-forward 32.
    assert profile.encoder_flops == 2 * 4 * 16 * (3 * 8 * 8 + 4 * 16 + 2 * 32) + 4 * 4**2 * 16
    assert profile.connector_flops == 2 * 4 * 16 * 32
    assert profile.lm_head_flops == TEXT * profile.lm_head_last_flops == 2 * BATCH * TEXT * 32 * 64


def test_whole_media_where_the_connector_changes_their_number() -> None:
    model = tiny_model("saisa")
    config = copy.deepcopy(model.config)
    config.connectors = {"image": {"type": "perceiver", "num_latents": 2, "depth": 1}}
    shortened = MultimodalLM(config)
    # 5 tokens of 2 for an image: 3 images for a sample.
    assert workload(shortened).features["image"].shape == (BATCH * 2, 4, 16)
    assert Workload.random(shortened, workload_tokens(shortened, 3, 5)).features["image"].shape == (3, 4, 16)
    assert profile_model(shortened, 3, 5).executed_flops > 0


# Memory


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_is_that_of_a_real_prefill(fusion: str, dtype: torch.dtype) -> None:
    model = tiny_model(fusion).to(dtype)
    cache = model.new_cache()
    with torch.no_grad():
        workload(model).run(model, cache)
    assert profile_model(model, TEXT, VISUAL, batch=BATCH).kv_bytes == cache_bytes(cache) > 0


def test_cache_of_text_alone_and_of_media_beside_it() -> None:
    token = 2 * 2 * 2 * 8 * 4  # two layers, keys and values, two heads of 8, float32
    assert profile_model(tiny_model("causal"), TEXT, VISUAL).kv_bytes == LENGTH * token
    media = VISUAL * 2 * 2 * 8 * 64 * 4  # blocks have eight heads of 64
    assert profile_model(tiny_model("cross_attention"), TEXT, VISUAL).kv_bytes == TEXT * token + media


@contextmanager
def saved_storages(model: MultimodalLM) -> Iterator[dict[int, Any]]:
    """What autograd keeps, by identity, without parameters."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
    for parameter in model.parameters():
        kept.pop(id(parameter.untyped_storage()), None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_activations_are_those_of_a_real_step(family: str) -> None:
    model = tiny_model("causal", family).train()
    profile = profile_model(model, TEXT, VISUAL, batch=BATCH)
    work = workload(model)
    work.embeds.requires_grad_()
    with saved_storages(model) as kept:
        out = work.run(model)
    heads = 4 * DecoderShape.of(model.config.text_config).head_dim
    # `sdpa` clears rows that see nothing, which copies the output and keeps which rows they are; other backends do not.
    cleared = 2 * BATCH * LENGTH * (4 * heads + 1)
    assert sum(storage.nbytes() for storage in kept.values()) == profile.activation_bytes + cleared
    model.activation_checkpointing_enable()
    with saved_storages(model) as kept:
        again = work.run(model)
    assert torch.equal(out, again)
    assert sum(storage.nbytes() for storage in kept.values()) == profile.checkpointed_activation_bytes
    assert profile.checkpointed_activation_bytes < profile.activation_bytes / 4


def test_frozen_parameters_save_activations() -> None:
    model = tiny_model()
    tuned = profile_model(model, TEXT, VISUAL).activation_bytes
    model.decoder.requires_grad_(False)
    assert profile_model(model, TEXT, VISUAL).activation_bytes < tuned


# The model


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("saisa").train()
    before = copy.deepcopy(model.state_dict())
    profile_model(model, TEXT, VISUAL)
    assert model.training
    assert not model.is_activation_checkpointing
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_on_meta_has_the_profile_of_a_real_one() -> None:
    real = tiny_model("saisa")
    with torch.device("meta"):
        bare = MultimodalLM(copy.deepcopy(real.config))
    assert profile_model(bare, TEXT, VISUAL) == profile_model(real, TEXT, VISUAL)


def test_adapters_are_part_of_the_model() -> None:
    model = tiny_model()
    plain = profile_model(model, TEXT, VISUAL)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model.decoder)
    adapted = profile_model(model, TEXT, VISUAL)
    assert adapted.parameters["decoder"] - plain.parameters["decoder"] == 2 * 2 * (32 + 32)
    assert adapted.executed_flops - plain.executed_flops == 2 * LENGTH * adapted_weights(2)


def adapted_weights(rank: int) -> int:
    """Of LoRA on the query projections of both layers."""
    return 2 * rank * (32 + 32)


def test_tied_weights_stay_tied() -> None:
    model = tiny_model(tie_word_embeddings=True)
    copied = copy_with(model, torch.zeros_like)
    assert copied.decoder.lm_head.weight is copied.get_input_embeddings().weight
    assert not copied.decoder.lm_head.weight.any()
    assert model.decoder.lm_head.weight.any()


def test_rotary_embeddings_that_look_at_positions() -> None:
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert profile_model(model, TEXT, VISUAL).executed_flops == profile_model(tiny_model(), TEXT, VISUAL).executed_flops


def test_media_of_another_modality_and_no_media() -> None:
    model = tiny_model("saisa", modalities=("audio",))
    audio = profile_model(model, TEXT, 3)
    assert audio.encoder_flops == 0
    assert audio.connector_flops == 2 * 3 * 12 * 32
    assert profile_model(model, TEXT, 0).kv_bytes == profile_model(tiny_model(), TEXT, 0).kv_bytes


@pytest.mark.parametrize(
    ("counts", "said"), [((0, 4, 1), "1 text tokens"), ((1, -1, 1), "0 visual"), ((1, 4, 0), "1 samples")]
)
def test_impossible_counts(counts: tuple[int, int, int], said: str) -> None:
    with pytest.raises(ConfigError, match=f"at least {said}"):
        profile_model(tiny_model(), counts[0], counts[1], batch=counts[2])


def test_nothing_but_the_map_is_real() -> None:
    bare, work = without_data(tiny_model(), TEXT, VISUAL)
    tensors = [*bare.parameters(), *bare.buffers(), work.embeds, *work.features.values()]
    assert {type(tensor.data).__name__ for tensor in tensors} == {"FakeTensor"}
    assert type(work.tokens.modality) is Tensor
