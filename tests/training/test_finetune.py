"""Fine-tuning through the command line: what trains, what is saved, and that a run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalLM
from mmfuse.training.checkpoints import load_network_weights, read_checkpoint
from mmfuse.training.cli import parse_and_build
from mmfuse.training.export import tuned_module

LORA = {"model": {"adapter": {"kind": "lora", "r": 4, "targets": ["decoder.attention", "encoder.image"]}}}


@pytest.fixture(scope="session")
def tuned(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with an adapter."""
    import yaml

    from mmfuse.cli import main

    from .conftest import merged, tiny_settings

    folder = tmp_path_factory.mktemp("tuned")
    settings = merged(merged(tiny_settings(), {"data": {"init_args": {"cache": str(cache)}}}), LORA)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def module_of(run: Path) -> Any:
    return parse_and_build(["--config", str(run / "config.yaml")], run=False).model


def test_checkpoints_hold_what_trains_and_the_base_stays(tuned: Path) -> None:
    held = read_checkpoint(tuned / "checkpoints" / "last.ckpt")["state_dict"]
    assert all("lora_" in name or name.startswith("network.connectors.") for name in held)
    module = module_of(tuned)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    load_network_weights(tuned / "checkpoints" / "last.ckpt", module)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in held), name


def test_an_adapter_means_nothing_on_other_weights(tuned: Path) -> None:
    path = tuned / "checkpoints" / "last.ckpt"
    other = parse_and_build(["--config", str(tuned / "config.yaml"), "--seed_everything", "7"], run=False).model
    with pytest.raises(ConfigError, match="trained on other weights"):
        load_network_weights(path, other)
    fewer = ["--config", str(tuned / "config.yaml"), "--model.adapter.targets", "[decoder.attention]"]
    with pytest.raises(ConfigError, match=r"0 weights are missing and \d+ are unexpected|does not fit"):
        load_network_weights(path, parse_and_build(fewer, run=False).model)


def test_validate_test_predict_generate_load_the_adapter(tuned: Path, mmfuse: Callable[..., Any]) -> None:
    config = tuned / "config.yaml"
    results = json.loads((tuned / "results.json").read_text())
    for command in ("validate", "test", "predict"):
        ran = mmfuse(command, "--config", config)
        assert ran.code == 0, ran.err
    again = json.loads((tuned / "results.json").read_text())
    assert again["trainable_parameters"] == results["trainable_parameters"] < results["parameters"]
    assert again["exact_match"] == results["exact_match"]
    answered = mmfuse("generate", "--ckpt", tuned, "--prompt", "which digit?")
    assert answered.code == 0, answered.err


def test_resume_is_exact(write_config: Callable[..., Path], mmfuse: Callable[..., Any], tmp_path: Path) -> None:
    dropout = {"model": {"adapter": {**LORA["model"]["adapter"], "kind": "dora"}, "gradient_checkpointing": True}}
    config = write_config(dropout)
    assert mmfuse("fit", "--config", config, "--out", tmp_path / "whole").code == 0
    assert mmfuse("fit", "--config", config, "--out", tmp_path / "cut", "--trainer.max_steps", 4).code == 0
    resumed = mmfuse("fit", "--config", config, "--out", tmp_path / "cut", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    whole, cut = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_mistakes(write_config: Callable[..., Path], mmfuse: Callable[..., Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"model": {"adapter": {"kind": "lorra"}}}, "lorra"),
        ({"model": {"adapter": {"rank": 4}}}, "rank"),
        ({"model": {"adapter": {"targets": ["decoder.attn"]}}}, "did you mean 'decoder.attention'"),
        ({"model": {"adapter": {"r": 4}, "ema_decay": 0.9}}, "ema_decay averages all weights"),
        ({"model": {"adapter": {"base_dtype": "bfloat16"}}}, "set trainer.precision to bf16-mixed"),
    ):
        ran = mmfuse("fit", "--config", write_config(changes), "--out", tmp_path / "run")
        assert ran.code == 2 and message in ran.err, ran.err


def test_exported_adapter_and_its_base_load_in_vanilla_peft(
    tuned: Path, mmfuse: Callable[..., Any], tmp_path: Path
) -> None:
    ran = mmfuse("export", "--ckpt", tuned, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "vLLM" in ran.out and "no" in ran.out
    module = tuned_module(tuned / "adapter", tuned / "config.yaml")
    chat = [{"role": "user", "content": "which digit?"}, {"role": "assistant", "content": "4"}]
    batch = module.processor(chat)
    expected = module.network(**batch).logits
    base = MultimodalLM.from_pretrained(tmp_path / "out" / "base").eval()
    theirs = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(theirs(**batch).logits, expected, rtol=0, atol=1e-5)
    assert mmfuse("generate", "--ckpt", tmp_path / "out", "--prompt", "which digit?").code == 0

    assert mmfuse("export", "--ckpt", tuned, "--merge", "--out", tmp_path / "merged").code == 0
    merged = MultimodalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-4)
    assert mmfuse("generate", "--ckpt", tmp_path / "merged", "--prompt", "which digit?").code == 0
    again = mmfuse("export", "--ckpt", tuned, "--out", tmp_path / "merged")
    assert again.code == 2 and "there is something already" in again.err


def test_merging_into_a_base_in_half_precision_rounds_nothing(
    write_config: Callable[..., Path], mmfuse: Callable[..., Any], tmp_path: Path
) -> None:
    half = {"model": {"adapter": {**LORA["model"]["adapter"], "base_dtype": "bfloat16"}}}
    config = write_config({**half, "trainer": {"precision": "bf16-mixed", "max_steps": 2}})
    assert mmfuse("fit", "--config", config, "--out", "run").code == 0
    assert mmfuse("export", "--ckpt", "run", "--merge", "--out", "merged").code == 0
    tuned = tuned_module(tmp_path / "run" / "adapter", tmp_path / "run" / "config.yaml").network.float().eval()
    merged = MultimodalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(40, 60).unsqueeze(0)
    with torch.no_grad():
        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, rtol=0, atol=1e-4)
    asked = mmfuse("generate", "--ckpt", "run", "--prompt", "Which?")
    assert asked.code == 0, asked.err


def test_a_damaged_adapter_is_refused_by_generate_and_export(
    tuned: Path, mmfuse: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    file = run / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace("q_proj", "query"): value for name, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    for words in (("generate", "--prompt", "which?"), ("export", "--out", tmp_path / "out")):
        ran = mmfuse(words[0], "--ckpt", run, *words[1:])
        assert ran.code == 2 and "does not fit the model" in ran.err


def test_a_run_without_an_adapter_is_exported_whole(finished: Path, mmfuse: Callable[..., Any], tmp_path: Path) -> None:
    assert mmfuse("export", "--ckpt", finished, "--out", tmp_path / "out").code == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (finished / "model", tmp_path / "out"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
