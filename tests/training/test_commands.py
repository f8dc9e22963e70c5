"""`generate`, `explain` and `list`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfuse.fusion import FUSIONS
from mmfuse.models.connectors import CONNECTORS
from mmfuse.models.encoders import ENCODERS

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    return path


def test_generate_answers(mmfuse: Command, finished: Path, picture: Path) -> None:
    words = ["--image", picture, "--prompt", "Read all digits.", "--max_new_tokens", "3"]
    from_run = mmfuse("generate", "--ckpt", finished, *words)
    from_model = mmfuse("generate", "--ckpt", finished / "model", *words)
    assert from_run.code == from_model.code == 0
    assert from_run.out == from_model.out
    assert from_run.out.endswith("\n")


def test_generate_with_beams_marks_and_without_image(mmfuse: Command, finished: Path, picture: Path) -> None:
    beams = ["--num_beams", "3", "--max_new_tokens", "2"]
    assert mmfuse("generate", "--ckpt", finished, "--prompt", "Hello", *beams).code == 0
    two = ["--image", picture, "--image", picture, "--prompt", "First <image>, then <image>", "--max_new_tokens", "2"]
    assert mmfuse("generate", "--ckpt", finished, *two).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "gone.png", "--prompt", "x"], ["gone.png", "no such file"]),
        (["--image", "text.png", "--prompt", "x"], ["text.png", "cannot read this image"]),
        (["--prompt", "a <image> that is not given"], ["1 <image> placeholders", "0 images"]),
        (["--imge", "x.png", "--prompt", "x"], ["--imge", "--image"]),
        (["--max_new", "3", "--prompt", "x"], ["--max_new", "--max_new_tokens"]),
        ([], ["--prompt"]),
    ],
)
def test_mistakes_in_generate_are_one_line(
    mmfuse: Command, finished: Path, tmp_path: Path, words: list[str], said: list[str]
) -> None:
    (tmp_path / "text.png").write_text("not an image")
    ran = mmfuse("generate", "--ckpt", finished, *words)
    assert ran.code == 2
    assert len(ran.err.strip().splitlines()) == 1
    for part in said:
        assert part in ran.err


def test_generate_names_what_a_folder_lacks(mmfuse: Command, tmp_path: Path) -> None:
    assert "no such folder" in mmfuse("generate", "--ckpt", "nowhere", "--prompt", "x").err
    (tmp_path / "empty").mkdir()
    assert "config.json" in mmfuse("generate", "--ckpt", "empty", "--prompt", "x").err


def test_explain_counts_tokens_and_draws_masks(mmfuse: Command, write_config: WriteConfig, tmp_path: Path) -> None:
    ran = mmfuse("explain", "--config", write_config(), "--out", tmp_path / "shown")
    assert ran.code == 0
    assert {file.name for file in (tmp_path / "shown").iterdir()} == {"1-align-mask.png", "2-instruct-mask.png"}
    with Image.open(tmp_path / "shown" / "2-instruct-mask.png") as picture:
        assert min(picture.size) > 100
    # A caption is <|bos|>, 4 image tokens, and "35 71<|end|>": 6 answer tokens. The batch holds 8.
    first = ran.out.split("stage 'instruct'")[0]
    assert "batch [8, 11]" in first
    counts = {line.rsplit(maxsplit=2)[0]: line.rsplit(maxsplit=2)[1] for line in first.splitlines() if "%" in line}
    assert counts["image, prompt"] == "32"
    assert counts["text, answer"] == counts["supervised"] == "48"
    assert counts["text, prompt"] == "8"
    assert "under Causal" in ran.out
    assert "under ModalityMutual" in ran.out


def test_explain_takes_overrides_and_refuses_unknown_ones(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config()
    words = ["explain", "--config", config, "--out", tmp_path / "shown"]
    assert "under PrefixLM" in mmfuse(*words, "--model.network.fusion", "prefix_lm").out
    refused = mmfuse(*words, "--model.network.fusoin", "prefix_lm")
    assert refused.code == 2
    assert "--model.network.fusion" in refused.err
    assert "0..7" in mmfuse(*words, "--sample", "8").err


def test_list_names_everything(mmfuse: Command) -> None:
    shown = mmfuse("list").out
    for name in (*FUSIONS, *ENCODERS, *CONNECTORS, "HandwritingData", "gemma3_text", "sdpa"):
        assert name in shown
    assert "pixel_shuffle" not in mmfuse("list", "fusions").out
    assert "did you mean 'fusions'" in mmfuse("list", "fusion").err
