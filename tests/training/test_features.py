"""From files of features to a run: fit, held-out answers with and without the features, and `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]

SHAPE = (3, 12)
ANSWERS = ("1", "3", "7")


def write_recordings(folder: Path, count: int, seed: int) -> Path:
    """Recordings with a burst in one of three moments; the answer says in which. Their mean says nothing."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        moment = number % len(ANSWERS)
        features = rng.normal(0.0, 0.1, SHAPE)
        features[moment] += 2.0
        np.save(folder / f"{number}.npy", features.astype(np.float16))
        turns = [("human", "<audio>\nWhat is this?"), ("gpt", ANSWERS[moment])]
        talk = [{"from": speaker, "value": text} for speaker, text in turns]
        lines.append(json.dumps({"audio": f"{number}.npy", "conversations": talk}))
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(write_config: WriteConfig, settings: dict[str, Any], tmp_path: Path) -> Path:
    """Audio as the only modality, in a model without a tower."""
    train, test = write_recordings(tmp_path / "train", 96, 0), write_recordings(tmp_path / "test", 24, 1)
    lr = {"connector": 1.0e-2, "decoder": 1.0e-2}
    settings["stages"] = [{"name": "listen", "steps": 60, "data": {"chats": 1.0}, "lr": lr, "warmup": 5}]
    network = settings["model"]["network"]
    network["encoders"] = {"audio": {"type": "precomputed", "hidden_size": SHAPE[1], "num_tokens": SHAPE[0]}}
    network["connectors"] = {"audio": {"type": "linear"}}
    sources = {"train": {"chats": {"path": str(train)}}, "val": {"path": str(test)}, "test": {"path": str(test)}}
    settings["data"] = {"class_path": "MultimodalData", "init_args": {**sources, "batch_size": 16}}
    settings["checkpoint_every"] = 30
    settings["trainer"]["val_check_interval"] = 30
    return write_config()


@pytest.mark.slow
def test_a_model_learns_from_features_and_is_blind_without_them(
    mmfuse: Command, config: Path, tmp_path: Path, read_json: Callable[[Path], Any]
) -> None:
    run = tmp_path / "run"
    fit = mmfuse("fit", "--config", config, "--out", run)
    assert fit.code == 0, fit.err
    results = read_json(run / "results.json")
    assert results["exact_match"] == 1.0
    assert results["blind_exact_match"] < 0.7

    files = [tmp_path / "test" / f"{number}.npy" for number in range(3)]
    words = ["generate", "--ckpt", run, "--prompt", "What is this?", "--max_new_tokens", "4"]
    assert [mmfuse(*words, "--audio", file).out.strip() for file in files] == list(ANSWERS)
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((4, 12)))
    refused = mmfuse(*words, "--audio", wrong)
    assert refused.code == 2
    assert f"{wrong}: features have shape [4, 12], the model takes [3, 12]" in refused.err
    assert "the model takes audio, but 1 images are given" in mmfuse(*words, "--image", wrong).err
    assert "expected features, in a file .npy or .safetensors" in mmfuse(*words, "--audio", config).err
