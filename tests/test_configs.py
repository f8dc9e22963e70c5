"""Every config in the repository is parsed by the strict command line and builds its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.fusion import FUSIONS
from mmfuse.models import MultimodalLM, NetworkSpec, build_network
from mmfuse.models.adopt import AdoptedConfig, AdoptedLM
from mmfuse.models.lora import AdapterSpec, attach_adapter, plan_adapter
from mmfuse.training.cli import config_schema, parse_and_build
from mmfuse.training.stages import Schedule, Stage
from mmfuse.training.strict import explain_mistake

CONFIGS = Path(__file__).parents[1] / "configs"
#: Those that take weights from the hub are built without them, on the meta device.
PRETRAINED = (
    "your_data.yaml",
    *(f"paper/{name}.yaml" for name in ("aki_4b", "ee_mllm_7b", "llava15_7b", "moda_8b", "saisa_7b")),
)
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
#: Those that change another one.
OVERLAYS = {
    name: "aki.yaml"
    for name in NAMES
    if "An overlay: mmfuse fit --config configs/aki.yaml" in (CONFIGS / name).read_text()
}
LORA = [f"lora/{name}.yaml" for name in ("llava15_7b", "paligemma_3b", "qwen25_vl_3b", "smolvlm_256m")]
#: Its model and data come from packages, see its head.
PACKAGES = "lora/smollm2_pictures.yaml"
OFFLINE = [name for name in NAMES if name not in (*PRETRAINED, *LORA, PACKAGES)]


def settings(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    return loaded


#: Overlays that change the fusion.
OTHER_FUSIONS = [name for name in OVERLAYS if "fusion" in settings(name)["model"]["network"]]


def on_meta(name: str) -> MultimodalLM:
    with torch.device("meta"):
        model, _ = build_network(NetworkSpec(**settings(name)["model"]["network"]), load_tokenizer())
    return model


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("name", OFFLINE)
def test_config_builds_model_data_and_trainer(name: str, tmp_path: Path) -> None:
    names = [OVERLAYS[name], name] if name in OVERLAYS else [name]
    words = [word for path in names for word in ("--config", str(CONFIGS / path))]
    words += ["--out", str(tmp_path), "--data.init_args.cache", str(tmp_path)]
    cli = parse_and_build(words, run=False)
    assert cli.trainer.max_steps == cli.model.schedule.steps
    assert set(cli.model.schedule.trained_parts()) <= set(cli.model.network.parts())
    assert cli.datamodule.stages == list(cli.model.schedule.stages)


def test_every_strategy_has_a_config_for_the_demo() -> None:
    fusions = {
        name: settings(name)["model"]["network"]["fusion"] for name in ("aki.yaml", "causal.yaml", *OTHER_FUSIONS)
    }
    names = [fusion if isinstance(fusion, str) else fusion["type"] for fusion in fusions.values()]
    assert sorted(names) == sorted(FUSIONS)


def test_overlay_of_verify_resume_makes_a_resume_hard_and_changes_nothing_else() -> None:
    own, base = settings("verify_resume.yaml"), settings("aki.yaml")
    encoder, known = own["model"]["network"]["encoders"]["image"], base["model"]["network"]["encoders"]["image"]
    assert encoder["config"].pop("attention_dropout") > 0 and encoder == known
    stream = own["data"]["init_args"]["stream"]
    assert stream["pack_to"] and stream["augment"]


@pytest.mark.parametrize("name", OTHER_FUSIONS)
def test_overlays_keep_the_budget(name: str) -> None:
    own, base = settings(name), settings(OVERLAYS[name])
    steps, expected = ([stage["steps"] for stage in config.get("stages", base["stages"])] for config in (own, base))
    assert steps == expected
    assert set(own) <= {"stages", "model"} and set(own["model"]) == {"network"}
    assert set(own["model"]["network"]) == {"fusion"}


@pytest.mark.parametrize("name", PRETRAINED)
def test_config_that_needs_the_hub_is_known_and_builds_on_meta(name: str) -> None:
    words = ["--config", str(CONFIGS / name)]
    assert explain_mistake("nothing", config_schema("fit"), words) == "nothing"
    stages = [Stage(**stage) for stage in settings(name)["stages"]]
    model = on_meta(name)
    assert set(Schedule(stages).trained_parts()) <= set(model.parts())
    sources = settings(name)["data"]["init_args"]["train"]
    assert {source for stage in stages for source in stage.data} <= set(sources)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "total", "trainable"),
    [
        ("llava15_7b", 7_063_427_072, 39_976_960 + 20_979_712),
        ("qwen25_vl_3b", 3_754_622_976, 29_933_568),
        ("smolvlm_256m", 256_484_928, 7_077_888 + 4_884_480 + 155_520),
        ("paligemma_3b", 2_923_466_480, 19_611_648),
    ],
)
def test_config_of_a_model_to_tune(name: str, total: int, trainable: int) -> None:
    path = f"lora/{name}.yaml"
    words = ["--config", str(CONFIGS / path)]
    assert explain_mistake("nothing", config_schema("fit"), words) == "nothing"
    own = settings(path)
    vlm = dict(own["model"]["network"]["vlm"])
    vlm.pop("pretrained")
    with torch.device("meta"):
        model = AdoptedLM(AdoptedConfig(vlm, own["model"]["network"]["fusion"]))
        model.requires_grad_(False)
        spec = AdapterSpec(**{**own["model"]["adapter"], "base_dtype": "float32"})
        plan = plan_adapter(model, spec, Schedule([Stage(**stage) for stage in own["stages"]]).trained_parts())
        attach_adapter(model, spec, plan)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    print(f"{name}: {base:,} parameters, {trains:,} of them or of the adapter train")
    assert (base, trains) == (total, trainable)


def test_the_config_of_packages_is_known_and_builds_on_meta() -> None:
    assert explain_mistake("nothing", config_schema("fit"), ["--config", str(CONFIGS / PACKAGES)]) == "nothing"
    network = settings(PACKAGES)["model"]["network"]
    decoder = {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model, _ = build_network(NetworkSpec(**{**network, "decoder": decoder}), load_tokenizer())
    assert model.visual_tokens("image") == 4
    AdapterSpec(**settings(PACKAGES)["model"]["adapter"])


def test_aki_4b_has_the_size_of_the_paper() -> None:
    model = on_meta("paper/aki_4b.yaml")
    assert sum(p.numel() for p in model.connectors.parameters()) == 81_608_448
    # SigLIP so400m without its pooling head, and Phi-3.5-mini.
    assert millions(model.encoders) == pytest.approx(413, abs=1)
    assert sum(p.numel() for p in model.decoder.parameters()) == 3_821_079_552
    assert model.visual_tokens("image") == 144
    align, instruct = (Stage(**stage) for stage in settings("paper/aki_4b.yaml")["stages"])
    assert align.fusion == "causal"
    assert not align.trains("encoder")
    assert not instruct.trains("encoder")
    assert instruct.learning_rate("decoder", instruct.steps) == pytest.approx(1e-6)
    assert max(instruct.learning_rate("decoder", step) for step in range(300)) == pytest.approx(2e-5)


def test_llava_and_what_is_built_on_it_have_the_size_of_the_papers() -> None:
    llava, saisa, ee_mllm = (on_meta(f"paper/{name}.yaml") for name in ("llava15_7b", "saisa_7b", "ee_mllm_7b"))
    assert sum(p.numel() for p in llava.decoder.parameters()) == 6_738_415_616
    assert sum(p.numel() for p in llava.connectors.parameters()) == 20_979_712
    assert llava.visual_tokens("image") == 576
    # An MLP in each of 32 layers, of which the first is the connector.
    assert millions(saisa.connectors) + millions(saisa.fusion) == pytest.approx(671.35, abs=0.01)
    assert millions(ee_mllm) == millions(llava)


@pytest.mark.parametrize("name", ["llava15_7b", "saisa_7b", "ee_mllm_7b"])
def test_the_recipe_of_llava(name: str) -> None:
    own = settings(f"paper/{name}.yaml")
    align, instruct = (Stage(**stage) for stage in own["stages"])
    batch = own["data"]["init_args"]["batch_size"] * own["trainer"]["devices"]
    assert (align.steps * batch // 1000, instruct.steps * batch // 1000) == (558, 665)
    assert align.lr == {"connector": 1e-3}
    assert set(instruct.lr.values()) == {2e-5} and instruct.trains("decoder") and not instruct.trains("encoder")
    for stage in (align, instruct):
        assert stage.warmup == round(0.03 * stage.steps)
        assert stage.learning_rate("connector", stage.steps) == 0
    assert own["model"]["optimizer"]["weight_decay"] == 0


def test_moda_8b_has_the_size_and_the_recipe_of_the_paper() -> None:
    model = on_meta("paper/moda_8b.yaml")
    assert sum(p.numel() for p in model.decoder.parameters()) == 8_030_261_248
    # In each of 32 layers a fuser [128, 256] for media and one for text.
    assert sum(p.numel() for p in model.fusion.parameters()) == 32 * 2 * 128 * 256
    own = settings("paper/moda_8b.yaml")
    _, instruct = (Stage(**stage) for stage in own["stages"])
    trainer, data = own["trainer"], own["data"]["init_args"]
    assert data["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"] == 2048
    assert instruct.lr["decoder"] == 2e-5 and instruct.lr["encoder"] == 2e-6
    assert instruct.warmup == round(0.03 * instruct.steps)


def test_causal_differs_from_aki_in_the_fusion_alone() -> None:
    aki, causal = settings("aki.yaml"), settings("causal.yaml")
    assert aki["model"]["network"].pop("fusion") == "mma"
    assert causal["model"]["network"].pop("fusion") == "causal"
    assert aki == causal


def test_validation_ends_with_the_last_step() -> None:
    for name in ("aki.yaml", "causal.yaml"):
        steps = Schedule([Stage(**stage) for stage in settings(name)["stages"]]).steps
        assert steps % settings(name)["trainer"]["val_check_interval"] == 0
