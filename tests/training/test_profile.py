"""`mmfuse profile`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfuse.fusion import FUSIONS

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]

PAPER = Path(__file__).parents[2] / "configs" / "paper"


def profiled(mmfuse: Command, *words: str | Path) -> dict[str, Any]:
    ran = mmfuse("profile", *words, "--json")
    assert ran.code == 0, ran.err
    loaded: dict[str, Any] = json.loads(ran.out)
    return loaded


def rows(text: str) -> dict[str, str]:
    """The lines of a table by their first word, with single spaces."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return {line.split(" ")[0]: line for line in lines if line}


@pytest.mark.slow
def test_figures_of_the_papers_at_their_size(mmfuse: Command) -> None:
    words = ["--config", PAPER / "saisa_7b.yaml", "--visual-tokens", "576", "--text-tokens", "64", "--dtype", "float16"]
    shown = rows(mmfuse("profile", *words).out)
    assert shown["causal"].startswith("causal 8.50 8.40 320 MiB 7.05 B")
    assert shown["saisa"].startswith("saisa 2.86 (−66.4 %) 2.84 (−66.2 %) 320 MiB 7.70 B")
    assert shown["composite"].startswith("composite 7.69 (−9.5 %) 7.52 (−10.5 %) 320 MiB 7.05 B")
    # Of the text 32 MiB, and in each of 32 layers keys and values of 576 tokens in 8 heads of 64.
    assert " 68 MiB " in shown["cross_attention"]
    assert shown["encoder"] == "encoder 0.37 TFLOPs one image"
    assert shown["connector"] == "connector 24.16 GFLOPs one image"


@pytest.mark.slow
def test_longer_texts_save_less_and_one_image_is_the_default(mmfuse: Command) -> None:
    words = ["--config", PAPER / "saisa_7b.yaml", "--text-tokens", "256", "--dtype", "float16"]
    found = profiled(mmfuse, *words)
    assert found["shape"] == {"text_tokens": 256, "visual_tokens": 576, "batch": 1, "dtype": "float16"}
    causal, saisa = found["strategies"]["causal"], found["strategies"]["saisa"]
    assert round(saisa["convention_flops"] / causal["convention_flops"] - 1, 3) == -0.512


def test_json_holds_every_strategy(mmfuse: Command, write_config: WriteConfig) -> None:
    words = ["--config", write_config(), "--visual-tokens", "4", "--text-tokens", "8", "--dtype", "float32"]
    found = profiled(mmfuse, *words, "--batch", "3", "--fusion", ",".join(FUSIONS))
    assert list(found["strategies"]) == list(FUSIONS)
    for strategy in found["strategies"].values():
        assert strategy["parameters"] == sum(strategy["parameters_by_part"].values())
        assert strategy["convention_flops"] % 3 == 0
        assert 0 < strategy["checkpointed_activation_bytes"] < strategy["activation_bytes"]
    # Two layers, keys and values, width 32, float32.
    assert found["strategies"]["causal"]["kv_bytes"] == 3 * 12 * 2 * 2 * 32 * 4
    assert found["lm_head_flops"] == 8 * found["lm_head_last_flops"]
    assert found["encoder_flops"] > 0


def test_all_strategies_are_the_default_and_the_config_s_own_keeps_its_settings(
    mmfuse: Command, write_config: WriteConfig
) -> None:
    everything = list(profiled(mmfuse, "--config", write_config())["strategies"])
    assert everything[:2] == ["causal", "mma"] and sorted(everything) == sorted(FUSIONS)
    own = write_config({"model": {"network": {"fusion": {"type": "naavit", "layers": [1]}}}})
    some = profiled(mmfuse, "--config", own, "--fusion", "causal,naavit")["strategies"]
    all_layers = profiled(mmfuse, "--config", write_config(), "--fusion", "naavit")["strategies"]
    assert some["causal"]["convention_flops"] > some["naavit"]["convention_flops"]
    assert some["naavit"]["convention_flops"] > all_layers["naavit"]["convention_flops"]


def test_keys_of_the_config_can_be_overridden(mmfuse: Command, write_config: WriteConfig) -> None:
    config = write_config()
    found = profiled(mmfuse, "--config", config, "--model.network.fusion", "saisa")
    assert list(found["strategies"])[:2] == ["causal", "saisa"]


def test_latency_is_measured_when_asked_for(mmfuse: Command, write_config: WriteConfig) -> None:
    config = write_config()
    ran = mmfuse("profile", "--config", config, "--fusion", "causal,mma", "--latency")
    assert ran.code == 0
    assert "median of 5" in ran.out
    assert ran.out.count(" ms") == 4
    timed = profiled(mmfuse, "--config", config, "--latency")["strategies"]["mma"]["latency"]
    assert set(timed) == {"device", "prefill_seconds", "decode_seconds", "runs"}
    assert "latency" not in profiled(mmfuse, "--config", config)["strategies"]["mma"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--visual-token", "5"], "did you mean '--visual-tokens'"),
        (["--jsn"], "did you mean '--json'"),
        (["--fusion", "causal,saissa"], "unknown fusion 'saissa': did you mean 'saisa'"),
        (["--model.network.fusoin", "mma"], "--model.network.fusion"),
        (["--text-tokens", "0"], "at least 1 text tokens, got 0"),
        (["--text-tokens", "many"], "--text-tokens"),
        (["--dtype", "float8"], "--dtype"),
        (["stray"], "unknown option 'stray'"),
    ],
)
def test_mistakes_are_one_line(mmfuse: Command, write_config: WriteConfig, words: list[str], said: str) -> None:
    ran = mmfuse("profile", "--config", write_config(), *words)
    assert ran.code == 2
    assert ran.out == ""
    assert len(ran.err.strip().splitlines()) == 1
    assert said in ran.err


def test_nothing_is_written(mmfuse: Command, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    mmfuse("profile", "--config", config)
    assert list(tmp_path.iterdir()) == [config]
