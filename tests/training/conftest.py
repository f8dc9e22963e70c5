"""A run that takes three seconds, and the `mmfuse` command inside this process."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfuse.cli import main

ALIGN, INSTRUCT = 3, 5

Settings = dict[str, Any]


def tiny_settings() -> Settings:
    """Two stages of 3 and 5 steps; the first tunes only the connector, under another fusion."""
    lr = 1.0e-2
    return {
        "seed_everything": 0,
        "stages": [
            {
                "name": "align",
                "steps": ALIGN,
                "data": {"align": 1.0},
                "fusion": "causal",
                "lr": {"connector": lr},
                "warmup": 1,
            },
            {
                "name": "instruct",
                "steps": INSTRUCT,
                "data": {"instruct": 0.75, "align": 0.25},
                "lr": {"encoder": lr, "connector": lr, "decoder": lr},
                "warmup": 1,
            },
        ],
        "model": {
            "network": {
                "fusion": "mma",
                "decoder": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "max_position_embeddings": 256,
                },
                "encoders": {
                    "image": {
                        "type": "hf",
                        "config": {
                            "model_type": "siglip_vision_model",
                            "hidden_size": 16,
                            "intermediate_size": 32,
                            "num_hidden_layers": 1,
                            "num_attention_heads": 2,
                            "image_size": 16,
                            "patch_size": 8,
                        },
                    }
                },
                "connectors": {"image": {"type": "linear"}},
            },
            "max_new_tokens": 4,
        },
        "data": {
            "class_path": "HandwritingData",
            "init_args": {
                "batch_size": 8,
                "eval_batch_size": 28,
                "scenes": {"align": 64, "instruct": 64, "val": 28, "test": 28},
            },
        },
        "checkpoint_every": 2,
        "trainer": {"accelerator": "cpu", "val_check_interval": 4},
    }


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """`settings` with `changes`; a mapping changes the keys that it has."""
    result = dict(settings)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


@dataclass(frozen=True)
class Ran:
    """What a command printed and returned."""

    code: int
    out: str
    err: str


Command = Callable[..., Ran]
WriteConfig = Callable[..., Path]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo data of all tests are written, once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(cache: Path) -> Settings:
    """The tiny config as a mapping that a test may change."""
    return copy.deepcopy(merged(tiny_settings(), {"data": {"init_args": {"cache": str(cache)}}}))


@pytest.fixture
def write_config(settings: Settings, tmp_path: Path) -> WriteConfig:
    """`write_config(changes)` writes the tiny config with them and returns the file."""

    def write(changes: Mapping[str, Any] | None = None, name: str = "tiny.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(merged(settings, changes or {}), sort_keys=False))
        return path

    return write


@pytest.fixture
def mmfuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`mmfuse("fit", "--config", file)` runs the command in this process, in the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> Ran:
        argv = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["mmfuse", *argv])
        capsys.readouterr()
        code = main(argv)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished fit; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(merged(tiny_settings(), {"data": {"init_args": {"cache": str(cache)}}})))
    assert main(["fit", "--config", str(config), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], list[dict[str, float]]]:
    """`read_rows(run)` gives the rows of a run's `metrics.csv` as numbers; cells that are empty are left out."""
    from mmfuse.training.metrics_csv import read_rows as read

    def rows(run: Path) -> list[dict[str, float]]:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in read(run / "metrics.csv")]

    return rows


@pytest.fixture(scope="session")
def read_json() -> Callable[[Path], Any]:
    """`read_json(file)`."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


#: What a save asks of the system, apart from writing.
SYSTEM_CALLS = ("open", "fsync", "mkdir", "unlink", "link", "symlink", "replace", "rename")


@pytest.fixture(scope="session")
def calls() -> Callable[[Callable[[], Any], int], dict[str, Callable[..., Any]]]:
    """`calls(act, point)` gives functions for the module `os`, by name.

    They do what they did, but `act` is called before (even) or behind (odd) call number `point // 2` of them all.
    """

    def wrapped(act: Callable[[], Any], point: int) -> dict[str, Callable[..., Any]]:
        made = itertools.count()

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                here = next(made) == point // 2
                if here and point % 2 == 0:
                    act()
                try:
                    return original(*args, **kwargs)
                finally:
                    if here and point % 2 == 1:
                        act()

            return call

        return {name: wrap(getattr(os, name)) for name in SYSTEM_CALLS}

    return wrapped
