"""A mistake in a config or a flag is refused, with what was probably meant; what is right is let through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfuse.training.cli import parse_and_build

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]


def refused(mmfuse: Command, *words: str | Path) -> str:
    """The one line that a mistake ends in."""
    ran = mmfuse("fit", *words)
    assert ran.code == 2
    lines = ran.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mmfuse: error: "), ran.err
    return str(lines[0].removeprefix("mmfuse: error: "))


def at(path: str, value: Any) -> dict[str, Any]:
    """`at("a.b", 1)` is `{"a": {"b": 1}}`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


# In files


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("stage", "stages"),
        ("modle", "model"),
        ("chekpoint_every", "checkpoint_every"),
        ("trainer.max_stepss", "max_steps"),
        ("trainer.accelarator", "accelerator"),
        ("model.ema_decy", "ema_decay"),
        ("model.netwrok", "network"),
        ("model.network.fusoin", "fusion"),
        ("model.network.conectors", "connectors"),
        ("model.optimizer.weight_dcay", "weight_decay"),
        ("data.init_args.batchsize", "batch_size"),
        ("data.init_args.scenes.colums", "cols"),
    ],
)
def test_unknown_key_in_a_config(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, path: str, meant: str
) -> None:
    config = write_config(at(path, 1))
    line = refused(mmfuse, "--config", config, "--out", tmp_path / "run")
    assert f"unknown key {path!r}" in line and f"did you mean {meant!r}" in line and str(config) in line
    assert not (tmp_path / "run").exists(), "a wrong config fails before anything is made"


def test_unknown_key_in_a_stage(mmfuse: Command, write_config: WriteConfig, settings: dict[str, Any]) -> None:
    stages = [settings["stages"][0], {**settings["stages"][1], "warmpu": 3}]
    line = refused(mmfuse, "--config", write_config({"stages": stages}))
    assert "unknown key 'stages[1].warmpu': did you mean 'warmup'?" in line


def test_mistake_in_the_second_config_names_that_file(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path
) -> None:
    (tmp_path / "more.yaml").write_text("trainer: {max_stepss: 3}\n")
    line = refused(mmfuse, "--config", write_config(), "--config", tmp_path / "more.yaml")
    assert line.startswith(f"{tmp_path / 'more.yaml'}: unknown key 'trainer.max_stepss'")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("HandwritngData", "HandwritingData"), ("mmfuse.training.data.MultimodalDta", "MultimodalData")],
)
def test_unknown_class(mmfuse: Command, write_config: WriteConfig, name: str, meant: str) -> None:
    line = refused(mmfuse, "--config", write_config({"data": {"class_path": name}}))
    assert f"data: unknown class {name!r}: did you mean {meant!r}?" in line


def test_unknown_class_of_a_callback(mmfuse: Command, write_config: WriteConfig) -> None:
    callbacks = [{"class_path": "lightning.pytorch.callbacks.EarlyStoping", "init_args": {"monitor": "val/loss"}}]
    line = refused(mmfuse, "--config", write_config({"trainer": {"callbacks": callbacks}}))
    assert "trainer.callbacks[0]: unknown class" in line and "did you mean 'EarlyStopping'?" in line


def test_unknown_argument_of_a_callback(mmfuse: Command, write_config: WriteConfig) -> None:
    callbacks = [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"montor": "val/loss"}}]
    line = refused(mmfuse, "--config", write_config({"trainer": {"callbacks": callbacks}}))
    assert "'trainer.callbacks[0].init_args.montor': did you mean 'monitor'?" in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "a config is a mapping of keys to values, found list"),
        ("just text\n", "a config is a mapping of keys to values, found str"),
        ("a: [1\n", "expected ',' or ']'"),
        ("", "a config is a mapping of keys to values, found NoneType"),
    ],
)
def test_file_that_is_no_config(mmfuse: Command, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    line = refused(mmfuse, "--config", path)
    assert line.startswith(f"{path}: ") and says in line


def test_config_that_does_not_exist(mmfuse: Command) -> None:
    assert refused(mmfuse, "--config", "no/such.yaml") == "no/such.yaml: No such file or directory"


def test_no_config_says_where_to_start(mmfuse: Command) -> None:
    assert "configs/aki.yaml" in refused(mmfuse)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (at("trainer.max_steps", "many"), "max_steps"),
        (at("data.init_args.batch_size", "big"), "batch_size"),
        (at("model.network.fusion", 3), "fusion"),
        (at("checkpoint_every", 0), "checkpoint_every must be at least 1"),
        (at("data.init_args.batch_size", 0), "data.batch_size must be at least 1, got 0"),
        (at("model.ema_decay", 99), "model.ema_decay must lie between 0 and 1, got 99"),
        (at("stages", []), "`stages` is empty"),
    ],
)
def test_wrong_value(mmfuse: Command, write_config: WriteConfig, changes: dict[str, Any], says: str) -> None:
    assert says in refused(mmfuse, "--config", write_config(changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (at("model.network.fusion", "mmaa"), "unknown fusion 'mmaa': did you mean 'mma'?"),
        (at("model.network.fusion", {"type": "mma", "layer": [1]}), "did you mean 'layers'?"),
        (at("model.network.decoder.hiden_size", 8), "did you mean 'hidden_size'?"),
        (at("model.network.decoder.model_type", "lama"), "did you mean 'llama'?"),
        (at("model.network.encoders.image.type", "tim"), "did you mean 'timm'?"),
        (at("model.network.encoders.image.pretraned", "x"), "did you mean 'pretrained'?"),
        (at("model.network.encoders.image.config.image_siz", 16), "did you mean 'image_size'?"),
        (at("model.network.connectors.image.type", "mpl"), "did you mean 'mlp'?"),
        (at("model.network.connectors.image.depht", 2), "depht"),
        (at("model.network.attention_backend", "spda"), "did you mean 'sdpa'?"),
        (at("model.network.chat_format.asistant", "x"), "did you mean 'assistant'?"),
        (at("model.tokenizer", "no/such/folder"), "no/such/folder"),
    ],
)
def test_wrong_part_of_the_network(
    mmfuse: Command, write_config: WriteConfig, changes: dict[str, Any], says: str
) -> None:
    assert says in refused(mmfuse, "--config", write_config(changes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"instrct": 1.0}}, "stage 'instruct': unknown training source 'instrct': did you mean 'instruct'?"),
        ({"lr": {"decodr": 1.0}}, "did you mean 'decoder'?"),
        ({"fusion": "prefix"}, "did you mean 'prefix_lm'?"),
        ({"warmup": 9}, "stage 'instruct': warmup must lie in 0..5"),
    ],
)
def test_wrong_value_in_a_stage(
    mmfuse: Command, write_config: WriteConfig, settings: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    stages = [settings["stages"][0], {**settings["stages"][1], **change}]
    assert says in refused(mmfuse, "--config", write_config({"stages": stages}))


@pytest.mark.parametrize(
    "words",
    [["--model.network.fusion", "mmaa"], ["--data.batch_size", "0"], ["--trainer.accelerator", "abacus"]],
)
def test_wrong_config_leaves_an_earlier_run_where_it_is(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, words: list[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name, text in (("config.yaml", "old"), ("metrics.csv", "step,train/loss\n1,0.5\n2,0.2")):
        (run / name).write_text(text)
    refused(mmfuse, "--config", write_config(), "--out", run, *words)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "tiny.yaml") == ["run"]
    assert [path.read_text() for path in sorted(run.iterdir())] == ["old", "step,train/loss\n1,0.5\n2,0.2"]


# In flags


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trainer.max_stepss", "3"], "unknown option --trainer.max_stepss: did you mean --trainer.max_steps?"),
        (["--trainer.max_stepss=3"], "unknown option --trainer.max_stepss: did you mean --trainer.max_steps?"),
        (["--trainr.max_steps", "3"], "did you mean --trainer?"),
        (["--trainer.max_step", "3"], "unknown option --trainer.max_step: did you mean --trainer.max_steps?"),
        (["--model.ema", "0.9"], "unknown option --model.ema: did you mean --model.ema_decay?"),
        (["--model.network.fusio", "mma"], "did you mean --model.network.fusion?"),
        (["--checkpoint_ever", "3"], "did you mean --checkpoint_every?"),
        (["--ou", "x"], "did you mean --out?"),
        (["--data", "HandwritngData"], "unknown class 'HandwritngData': did you mean 'HandwritingData'?"),
        (["--data.batch_sise", "3"], "did you mean --data.batch_size?"),
        (["--data.init_args.batch_sise", "3"], "batch_size"),
        (["--ckpt", "last"], "did you mean --ckpt_path?"),
    ],
)
def test_unknown_flag(mmfuse: Command, write_config: WriteConfig, tmp_path: Path, words: list[str], says: str) -> None:
    line = refused(mmfuse, "--config", write_config(), "--out", tmp_path / "run", *words)
    assert says in line
    assert not (tmp_path / "run").exists()


def test_stray_word_is_refused(mmfuse: Command, write_config: WriteConfig) -> None:
    assert "configs/other.yaml" in refused(mmfuse, "--config", write_config(), "configs/other.yaml")


# What is right is let through


def built(config: Path, *words: str) -> Any:
    return parse_and_build(["--config", str(config), "--out", str(config.parent / "run"), *words], run=False)


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--trainer.max_steps", "3"], "trainer.max_steps", 3),
        (["--trainer.max_steps=3"], "trainer.max_steps", 3),
        (["--data.init_args.batch_size", "4"], "datamodule.batch_size", 4),
        (["--data.batch_size", "4"], "datamodule.batch_size", 4),
        (["--data.scenes.cols", "3"], "datamodule.scenes.cols", 3),
        (["--model.ema_decay", "0.5"], "model.ema_decay", 0.5),
        (["--model.network.fusion", "causal"], "model.network.config.fusion", "causal"),
        (["--model.optimizer.weight_decay", "0.25"], "model.optimizer_spec.weight_decay", 0.25),
        (["--seed_everything", "7"], "datamodule.seed", 7),
        (["--trainer.gradient_clip_val", "null"], "trainer.gradient_clip_val", None),
    ],
)
def test_flag_changes_its_setting(write_config: WriteConfig, words: list[str], path: str, value: Any) -> None:
    found = built(write_config(), *words)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_later_config_overlays_the_earlier(write_config: WriteConfig, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(at("model.network.fusion", "prefix_lm")))
    made = built(write_config(), "--config", str(overlay))
    assert made.model.network.config.fusion == "prefix_lm"
    assert made.model.max_new_tokens == 4, "what the overlay leaves out stays"


def test_other_callbacks_and_loggers_are_let_through(write_config: WriteConfig, tmp_path: Path) -> None:
    lightning = "lightning.pytorch"
    stopping = {
        "class_path": f"{lightning}.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/loss", "patience": 2},
    }
    short = {"class_path": "LearningRateMonitor"}
    logger = {"class_path": f"{lightning}.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "more"}}
    made = built(write_config({"trainer": {"callbacks": [stopping, short], "logger": logger}}))
    names = [type(callback).__name__ for callback in made.trainer.callbacks]
    assert {"EarlyStopping", "LearningRateMonitor", "StepMetrics"} <= set(names)


def test_logger_of_the_config_stands_beside_ours(
    mmfuse: Command, write_config: WriteConfig, finished: Path, cache: Path, tmp_path: Path
) -> None:
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "more", "version": "x"},
    }
    train = {"a": {"path": str(next(cache.glob("handwriting-*")) / "align-*.tar")}}
    path = write_config({"trainer": {"logger": logger}})
    settings = yaml.safe_load(path.read_text())
    settings["data"] = {"class_path": "MultimodalData", "init_args": {"train": train, "batch_size": 4}}
    settings["stages"] = [{"name": "s", "steps": 2, "data": {"a": 1.0}, "lr": {"decoder": 1.0e-3}}]
    path.write_text(yaml.safe_dump(settings))
    assert mmfuse("fit", "--config", path, "--out", tmp_path / "run").code == 0
    assert (tmp_path / "run" / "metrics.csv").exists()
    assert "train/loss" in (tmp_path / "more" / "x" / "metrics.csv").read_text()


def test_print_config_shows_the_settings(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config()
    with pytest.raises(SystemExit) as stopped:
        parse_and_build(["fit", "--config", str(config), "--trainer.max_steps", "3", "--print_config"])
    assert stopped.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["max_steps"] == 3 and shown["model"]["network"]["fusion"] == "mma"
    assert shown["data"]["init_args"]["batch_size"] == 8


def test_long_list_on_the_command_line_is_no_path(write_config: WriteConfig, settings: dict[str, Any]) -> None:
    stages = [{**stage, "name": f"{number} {'x' * 200}"} for number, stage in enumerate(settings["stages"])]
    built = parse_and_build(["--config", str(write_config()), "--stages", json.dumps(stages)], run=False)
    assert [stage.name for stage in built.model.schedule.stages] == [stage["name"] for stage in stages]


def test_a_backend_that_cannot_train_here_is_one_line(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path
) -> None:
    path = write_config(at("model.network.attention_backend", "flex"))
    ran = mmfuse("fit", "--config", path, "--out", tmp_path / "run")
    assert ran.code == 1
    (line,) = [line for line in ran.err.splitlines() if "error" in line]
    assert "attention backend 'flex' refuses: FlexAttention has no backward pass on the CPU" in line
    assert "Backends that can: reference, sdpa, rectangles" in line
    assert "Traceback" not in ran.err
