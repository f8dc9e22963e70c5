"""Adapters: what they name, what trains, what stays to the bit, and what vanilla PEFT makes of the files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalLM
from mmfuse.models.adapter_files import load_adapter, save_adapter
from mmfuse.models.lora import (
    AdapterPlan,
    AdapterSpec,
    attach_adapter,
    base_fingerprint,
    plan_adapter,
    quantize_decoder,
    remove_adapter,
)
from mmfuse.testing import FAMILIES, tiny_batch, tiny_model
from mmfuse.testing.vlms import tiny_vlm

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None


def adapted(model: MultimodalLM, parts: tuple[str, ...] = ("decoder", "connector"), **spec: Any) -> AdapterPlan:
    own = AdapterSpec(**{"r": 4, **spec})
    plan = plan_adapter(model, own, parts)
    attach_adapter(model, own, plan)
    return plan


def train(model: MultimodalLM, batch: dict[str, Any], steps: int = 3) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_by_part(family: str) -> None:
    model = tiny_model("mma", family)
    plan = plan_adapter(model, AdapterSpec(targets=["decoder.attention", "decoder.mlp"]), ["decoder"])
    linear = {path for path, module in model.decoder.named_modules() if type(module) is nn.Linear} - {"lm_head"}
    assert {path.removeprefix("decoder.") for path in plan.linear} == linear
    attention = plan_adapter(model, AdapterSpec(targets=["decoder.attention"]), ["decoder"])
    assert attention.linear and all(".self_attn." in path for path in attention.linear)
    assert plan.full == attention.full == ()


def test_targets_of_encoder_connector_and_modules() -> None:
    model = tiny_model("mma")
    plan = plan_adapter(model, AdapterSpec(targets=["encoder.image", "v_proj"]), ["encoder", "decoder", "connector"])
    assert all(path.startswith("encoders.image.") or path.endswith("v_proj") for path in plan.linear)
    assert sum(path.startswith("decoder.") for path in plan.linear) == 2
    assert plan.full == ("connectors.image",)
    both = plan_adapter(
        model, AdapterSpec(targets=["connector"], modules_to_save=["model.norm"]), ["connector", "decoder"]
    )
    assert both == AdapterPlan(("connectors.image.projection.0",), ("decoder.model.norm",))


@pytest.mark.parametrize(
    ("spec", "parts", "message"),
    [
        ({"targets": ["decoder.atention"]}, ["decoder"], "did you mean 'decoder.attention'"),
        ({"targets": ["encoder.audio"]}, ["encoder"], "unknown encoder in targets 'audio'"),
        ({"targets": ["decoder.mlp"]}, ["connector"], "targets names the decoder, which no stage trains"),
        (
            {"targets": ["decoder.attention"], "modules_to_save": ["decoder.model.layers.0.self_attn"]},
            ["decoder"],
            "is to train in full",
        ),
        ({"targets": ["decoder.mlp"], "modules_to_save": ["lm_heat"]}, ["decoder"], "did you mean 'lm_head'"),
        ({"targets": ["norm"]}, ["decoder"], "norm in targets holds no linear layers"),
    ],
)
def test_mistakes_in_what_is_named(spec: dict[str, Any], parts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_adapter(tiny_model("mma"), AdapterSpec(**spec), parts)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "lorra"}, "unknown adapter kind 'lorra': did you mean 'lora'"),
        ({"r": 0}, "at least 1"),
        ({"dropout": 1.0}, "0..1"),
        ({"targets": []}, "targets is empty"),
        ({"base_dtype": "float16"}, "unknown adapter base_dtype"),
    ],
)
def test_mistakes_in_the_spec(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterSpec(**spec)


def test_a_connector_that_a_strategy_copies_trains_in_full() -> None:
    with pytest.raises(ConfigError, match="SAISA starts its projectors from the connector"):
        plan_adapter(tiny_model("saisa"), AdapterSpec(targets=["connector"]), ["connector", "fusion"])


def test_tied_embeddings_cannot_be_saved_with_an_adapter() -> None:
    model = tiny_model("mma", tie_word_embeddings=True)
    spec = AdapterSpec(targets=["decoder.mlp"], modules_to_save=["embed_tokens"])
    with pytest.raises(ConfigError, match="tied to the head"):
        plan_adapter(model, spec, ["decoder"])


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_what_is_named_trains_and_the_rest_stays_to_the_bit(kind: str) -> None:
    model = tiny_model("mma")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plan = adapted(model, kind=kind)
    batch = tiny_batch(model)
    train(model.train(), batch)
    named = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert named == {name for name in dict(model.named_parameters()) if "lora_" in name or "connectors" in name}
    for path in plan.linear:
        assert torch.equal(model.get_submodule(path).base_layer.weight, before[f"{path}.weight"])
    remove_adapter(model, merge=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) is not name.startswith("connectors"), name


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("fusion", ["mma", "saisa"])
def test_vanilla_peft_loads_it_onto_our_class(kind: str, fusion: str, tmp_path: Path) -> None:
    model = tiny_model(fusion)
    batch = tiny_batch(model)
    plan = adapted(model, ("connector", "decoder", "fusion"), kind=kind, modules_to_save=["lm_head"])
    train(model.train(), batch)
    save_adapter(model.eval(), tmp_path, plan)
    base = tiny_model(fusion)
    plain = base(**batch).logits
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (loaded(**batch).logits - plain).abs().max() > 1e-2

    ours = tiny_model(fusion)
    again = load_adapter(ours, tmp_path)
    assert (set(again.linear), set(again.full)) == (set(plan.linear), set(plan.full))
    assert torch.equal(ours.eval()(**batch).logits, model(**batch).logits)
    remove_adapter(ours, merge=True)
    assert type(ours.get_submodule(plan.linear[0])) is nn.Linear
    torch.testing.assert_close(ours(**batch).logits, model(**batch).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fusion", ["native", "mma", "saisa", "naavit"])
def test_an_adapter_of_an_adopted_model_comes_back(fusion: str, tmp_path: Path) -> None:
    """Names are those of the original class, but for modules that only the strategy has."""
    vlm, _ = tiny_vlm("llava")
    model = MultimodalLM.from_vlm(vlm, fusion)
    batch = tiny_batch(model)
    plan = adapted(model, ("connector", "decoder", "fusion"))
    train(model.train(), batch)
    save_adapter(model.eval(), tmp_path, plan)
    again = MultimodalLM.from_vlm(vlm, fusion)
    plain = again(**batch).logits
    loaded = load_adapter(again, tmp_path)
    assert (set(loaded.linear), set(loaded.full)) == (set(plan.linear), set(plan.full))
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)
    assert (again(**batch).logits - plain).abs().max() > 1e-2


def test_what_peft_saved_loads_here(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=r"decoder\..*\.(q_proj|v_proj)", modules_to_save=["connectors.image"])
    theirs = get_peft_model(tiny_model("mma"), config)
    batch = tiny_batch(theirs.get_base_model())
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.eval().save_pretrained(tmp_path)
    ours = tiny_model("mma")
    load_adapter(ours, tmp_path)
    assert torch.equal(ours.eval()(**batch).logits, theirs(**batch).logits)


@pytest.mark.parametrize("damage", ["renamed", "dropped", "added", "foreign", "shape"])
def test_an_adapter_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    model = tiny_model("mma")
    save_adapter(model, tmp_path, adapted(model))
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(name for name in weights if "v_proj.lora_A" in name)
    if damage == "renamed":
        weights = {
            name.replace("decoder.model.layers", "model.language_model.layers"): v for name, v in weights.items()
        }
    elif damage == "dropped":
        del weights[key]
    elif damage == "added":
        weights[key.replace("v_proj", "w_proj")] = weights[key].clone()
    elif damage == "foreign":
        weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    else:
        weights[key] = weights[key][:2].clone()
    save_file(weights, file, metadata={"format": "pt"})
    messages = {"foreign": "no key of PEFT's", "shape": "has shape"}
    with pytest.raises(ConfigError, match=messages.get(damage, "does not fit the model.*would do nothing")):
        load_adapter(tiny_model("mma"), tmp_path)


def test_a_renamed_config_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mma")
    save_adapter(model, tmp_path, adapted(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = [name.replace("layers", "blocks") for name in config["target_modules"]]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_adapter(tiny_model("mma"), tmp_path)
    with pytest.raises(FileNotFoundError, match="this is no adapter"):
        load_adapter(tiny_model("mma"), tmp_path / "nowhere")


def test_the_fingerprint_tells_bases_apart() -> None:
    plan = AdapterPlan((), ("connectors.image",))
    one, same, other = tiny_model("mma"), tiny_model("mma"), tiny_model("mma", seed=1)
    assert base_fingerprint(one, plan) == base_fingerprint(same, plan) != base_fingerprint(other, plan)
    with torch.no_grad():
        same.connectors["image"].projection[0].weight.add_(1.0)  # trains in full, and is no part of the base
    assert base_fingerprint(one, plan) == base_fingerprint(same, plan)


def test_a_base_in_half_the_memory_trains_under_mixed_precision() -> None:
    model = tiny_model("mma")
    adapted(model, base_dtype="bfloat16")
    kinds = {(weight.requires_grad, weight.dtype) for weight in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):
        train(model.train(), tiny_batch(model), steps=1)
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.skipif(HAS_BNB, reason="bitsandbytes is installed")
def test_qlora_says_what_it_needs() -> None:
    model = tiny_model("mma")
    spec = AdapterSpec(kind="qlora")
    with pytest.raises(ConfigError, match=r"pip install 'mmfuse\[qlora\]'"):
        attach_adapter(model, spec, plan_adapter(model, spec, ["decoder"]))


@pytest.mark.skipif(not HAS_BNB, reason="needs bitsandbytes")
def test_qlora_trains_over_four_bits(tmp_path: Path) -> None:
    model = tiny_model("mma")
    batch = tiny_batch(model)
    full = model(**batch).logits
    plan = adapted(model, kind="qlora")
    assert (model(**batch).logits - full).abs().max() > 0  # 4 bits are not the weights
    layer = model.get_submodule(plan.linear[0])
    assert type(layer.base_layer).__name__ == "Linear4bit" and layer.base_layer.weight.numel() < full.numel() * 99
    packed = layer.base_layer.weight.detach().clone()
    first = model(**batch).loss.item()
    train(model.train(), batch, steps=5)
    assert model.eval()(**batch).loss.item() < first - 0.1
    assert torch.equal(layer.base_layer.weight, packed)
    save_adapter(model, tmp_path, plan)
    ours = tiny_model("mma")
    quantize_decoder(ours)
    load_adapter(ours, tmp_path)
    assert torch.equal(ours.eval()(**batch).logits, model(**batch).logits)
    with pytest.raises(ConfigError, match="4-bit weights"):
        remove_adapter(ours, merge=True)
