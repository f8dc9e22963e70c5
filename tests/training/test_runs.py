"""Run folders: what a fit leaves, what `test`, `validate` and `predict` make of it, and what happens to older files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalLM
from mmfuse.training.checkpoints import read_checkpoint
from mmfuse.training.cli import parse_and_build
from mmfuse.training.runs import claim_folder, default_folder

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]
LAST_STEP = 8


def test_finished_run_has_its_files(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    names = {name for name in names if not name.startswith("tensorboard/")}
    assert names >= {
        *("config.yaml", "metrics.csv", "results.json", "report.html", "predictions.jsonl"),
        *("checkpoints/last.ckpt", "checkpoints/best.ckpt"),
        *("model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/processor_config.json"),
        *(f"plots/{name}.png" for name in ("losses", "families", "predictions", "attention", "mask")),
    }
    assert not [name for name in names if "tmp" in name]


def test_metrics_hold_every_step_and_its_validation(finished: Path, read_rows: Callable[[Path], Any]) -> None:
    rows = read_rows(finished)
    assert [row["step"] for row in rows] == list(range(1, LAST_STEP + 1))
    assert [row["step"] for row in rows if "val/loss" in row] == [4, 8]
    assert all({"train/loss", "train/supervised_tokens", "tokens_per_second/text"} <= row.keys() for row in rows)
    assert [row["lr/decoder"] > 0 for row in rows] == [False] * 3 + [True] * 5
    # What was logged is the rate that the step was made with: warm-up over one step begins at half the peak.
    assert [rows[0]["lr/connector"], rows[1]["lr/connector"]] == [0.005, 0.01]


def test_results_are_flat_and_complete(finished: Path, read_json: Callable[[Path], Any]) -> None:
    results = read_json(finished / "results.json")
    numbers = {
        *("n", "exact_match", "blind_exact_match", "majority_exact_match", "seconds", "tokens_per_second"),
        *("parameters", "trainable_parameters", "steps", "seed"),
    }
    for name in numbers:
        assert isinstance(results[name], int | float), name
    assert (results["n"], results["steps"], results["fusion"], results["seed"]) == (28, LAST_STEP, "mma", 0)
    assert {"torch_version", "git_commit", "data_hash", "by_family", "mmfuse_version"} <= results.keys()
    assert sum(row["n"] for row in results["by_family"].values()) == 28
    nested = [name for name, value in results.items() if isinstance(value, dict)]
    assert nested == ["by_family"]
    saved = read_checkpoint(finished / "checkpoints" / "last.ckpt", map_location="cpu")["state_dict"]
    assert results["parameters"] == sum(value.numel() for value in saved.values() if value.is_floating_point())


def test_predictions_are_one_line_for_each_question_in_order(
    finished: Path, read_json: Callable[[Path], Any], settings: dict[str, Any]
) -> None:
    lines = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    results = read_json(finished / "results.json")
    assert len(lines) == results["n"]
    assert [line["key"] for line in lines] == [f"test-0000.tar:test-{number:06d}" for number in range(28)]
    assert {"question", "answer", "prediction", "blind_prediction", "family"} <= lines[0].keys()
    right = sum(line["prediction"].strip() == line["answer"] for line in lines)
    blind = sum(line["blind_prediction"].strip() == line["answer"] for line in lines)
    assert right / 28 == pytest.approx(results["exact_match"]) and blind / 28 == pytest.approx(
        results["blind_exact_match"]
    )


def test_report_shows_scores_and_pictures_without_other_files(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    assert "mma" in html and "exact match" in html.lower()
    assert html.count("data:image/png;base64,") == 5
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script src" not in html


def test_exported_model_is_the_best_checkpoint(finished: Path) -> None:
    best = read_checkpoint(finished / "checkpoints" / "best.ckpt", map_location="cpu")["state_dict"]
    saved = MultimodalLM.from_pretrained(finished / "model").state_dict()
    assert saved.keys() == {name.removeprefix("network.") for name in best}
    for name, value in saved.items():
        torch.testing.assert_close(value, best[f"network.{name}"], rtol=0, atol=0, msg=name)


# The saved config


def parsed(path: Path) -> Any:
    """The settings that a config parses to."""
    from lightning.pytorch.cli import LightningCLI

    built = parse_and_build(["--config", str(path)], run=False)
    assert isinstance(built, LightningCLI)
    text = built.parser.dump(built.config, skip_none=False)
    return {name: value for name, value in yaml.safe_load(text).items() if name not in ("config", "out")}


def test_saved_config_parses_to_the_same_settings(finished: Path) -> None:
    original, saved = parsed(finished.parent / "tiny.yaml"), parsed(finished / "config.yaml")
    assert saved == original
    assert yaml.safe_load((finished / "config.yaml").read_text())["out"] == str(finished)


def test_saved_config_leaves_the_length_of_the_run_to_its_stages(finished: Path) -> None:
    """Otherwise the run's config with other stages would stop, in silence, where the old ones did."""
    assert yaml.safe_load((finished / "config.yaml").read_text())["trainer"]["max_steps"] in (-1, None)


# Commands on a finished run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    target = tmp_path / "copy"
    shutil.copytree(finished, target)
    text = (target / "config.yaml").read_text().replace(str(finished), str(target))
    (target / "config.yaml").write_text(text)
    return target


def test_test_of_a_finished_run_gives_the_same_scores(
    copy: Path, finished: Path, mmfuse: Command, read_json: Callable[[Path], Any]
) -> None:
    (copy / "predictions.jsonl").unlink()
    (copy / "report.html").unlink()
    metrics = (copy / "metrics.csv").read_text()
    assert mmfuse("test", "--config", copy / "config.yaml").code == 0
    before, after = read_json(finished / "results.json"), read_json(copy / "results.json")
    assert after == before, "what training measured is kept, and the scores come from the same weights"
    assert (copy / "predictions.jsonl").read_text() == (finished / "predictions.jsonl").read_text()
    assert (copy / "report.html").exists()
    assert (copy / "metrics.csv").read_text() == metrics


def test_test_takes_another_checkpoint(copy: Path, mmfuse: Command, read_json: Callable[[Path], Any]) -> None:
    path = copy / "checkpoints" / "last.ckpt"
    held = read_checkpoint(path, map_location="cpu")
    for value in held["state_dict"].values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.zero_()
    torch.save(held, path)
    assert mmfuse("test", "--config", copy / "config.yaml", "--ckpt_path", "last").code == 0
    rows = [json.loads(line) for line in (copy / "predictions.jsonl").read_text().splitlines()]
    assert len({row["prediction"] for row in rows}) == 1, "zero weights say the same to everything"


def test_predict_writes_answers_without_blind_ones(copy: Path, finished: Path, mmfuse: Command) -> None:
    assert mmfuse("predict", "--config", copy / "config.yaml").code == 0
    rows = [json.loads(line) for line in (copy / "predictions.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "blind_prediction"} for row in before] == rows


def test_validate_prints_loss_and_exact_match(copy: Path, mmfuse: Command, read_rows: Callable[[Path], Any]) -> None:
    ran = mmfuse("validate", "--config", copy / "config.yaml", "--ckpt_path", "best")
    assert ran.code == 0
    best = max((row for row in read_rows(copy) if "val/loss" in row), key=lambda row: row["val/exact_match"])
    assert ran.out.splitlines() == [f"{name} {best[name]:.4f}" for name in ("val/loss", "val/exact_match")]


def test_commands_without_held_out_data_are_one_line(
    copy: Path, mmfuse: Command, cache: Path, write_config: WriteConfig
) -> None:
    shards = next(cache.glob("handwriting-*"))
    data = {"class_path": "MultimodalData", "init_args": {"train": {"a": {"path": str(shards / "align-*.tar")}}}}
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"] = data
    config["stages"] = [{"name": "s", "steps": 1, "data": {"a": 1.0}, "lr": {"decoder": 1.0e-3}}]
    config["trainer"]["max_steps"] = -1
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    for command, part in (("test", "test"), ("predict", "test"), ("validate", "val")):
        ran = mmfuse(command, "--config", copy / "config.yaml")
        assert ran.code == 2 and f"data.{part} is not set" in ran.err, ran.err


def test_commands_need_a_checkpoint(mmfuse: Command, write_config: WriteConfig, tmp_path: Path) -> None:
    for command in ("test", "validate", "predict"):
        ran = mmfuse(command, "--config", write_config(), "--out", tmp_path / "none")
        assert ran.code == 2 and "--ckpt_path best: no checkpoint at" in ran.err
    assert not (tmp_path / "none").exists()


# Folders


@pytest.fixture
def quick(finished: Path, write_config: WriteConfig, cache: Path) -> Path:
    """A config of two steps without held-out data."""
    path = write_config()
    settings = yaml.safe_load(path.read_text())
    train = {"a": {"path": str(next(cache.glob("handwriting-*")) / "align-*.tar")}}
    settings["data"] = {"class_path": "MultimodalData", "init_args": {"train": train, "batch_size": 4}}
    settings["stages"] = [{"name": "s", "steps": 2, "data": {"a": 1.0}, "lr": {"decoder": 1.0e-3}}]
    path.write_text(yaml.safe_dump(settings))
    return path


def test_second_fit_moves_the_first_aside(mmfuse: Command, quick: Path, tmp_path: Path) -> None:
    words = ["fit", "--config", quick, "--out", tmp_path / "run"]
    for number in range(2):
        ran = mmfuse(*words)
        assert ran.code == 0
        said = f"an earlier run was moved from {tmp_path / 'run'} to {tmp_path / 'run.1'}" in ran.err
        assert said == (number == 1)
    for folder in ("run", "run.1"):
        assert (tmp_path / folder / "results.json").exists()


def test_runs_are_moved_to_the_next_free_number(tmp_path: Path) -> None:
    for number in range(3):
        claim_folder(tmp_path / "run", resuming=False)
        (tmp_path / "run" / "config.yaml").write_text(str(number))
    held = {path.name: (path / "config.yaml").read_text() for path in tmp_path.iterdir()}
    assert held == {"run": "2", "run.1": "0", "run.2": "1"}


def test_resumed_run_stays_where_it_is(tmp_path: Path) -> None:
    claim_folder(tmp_path / "run", resuming=False)
    (tmp_path / "run" / "config.yaml").write_text("mine")
    claim_folder(tmp_path / "run", resuming=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folder_with_other_files_is_refused(mmfuse: Command, write_config: WriteConfig, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    ran = mmfuse("fit", "--config", write_config(), "--out", folder)
    assert ran.code == 2 and f"--out {folder}: the folder holds other files and no earlier run" in ran.err
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run: this is a file; a run needs a folder"):
        claim_folder(tmp_path / "run", resuming=False)


def test_folder_is_named_after_the_first_config() -> None:
    assert default_folder(["configs/aki.yaml", "other.yaml"]) == Path("runs/aki-other")
    with pytest.raises(ConfigError, match="no --config and no --out"):
        default_folder([])


def test_fit_without_validation_data_exports_its_last_state(
    mmfuse: Command, quick: Path, tmp_path: Path, read_json: Callable[[Path], Any]
) -> None:
    ran = mmfuse("fit", "--config", quick, "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["last.ckpt"]
    results = read_json(tmp_path / "run" / "results.json")
    assert results["steps"] == 2 and "exact_match" not in results
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", map_location="cpu")["state_dict"]
    saved = MultimodalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    for name, value in saved.items():
        torch.testing.assert_close(value, last[f"network.{name}"], rtol=0, atol=0, msg=name)
