"""`mmfuse kernels` says what `auto` runs, and why."""

from __future__ import annotations

import pytest

from mmfuse.errors import ConfigError
from mmfuse.kernels import Call, choose
from mmfuse.training.kernels import MASKS, example, main


@pytest.mark.parametrize(
    ("words", "runs", "told"),
    [
        ("--mask naavit --length 2048", "rectangles", "3 rectangles hold"),
        ("--mask causal --length 2048", "sdpa", "the fused kernel needs no mask"),
        ("--mask mma --length 64", "sdpa", "too small"),
        ("--mask composite --length 2048", "sdpa", "SELF"),
        ("--mask naavit --length 2048 --device cuda", "sdpa", "it runs on the CPU, not on cuda"),
        ("--mask packed --length 2048 --backward", "rectangles", "no backward pass on the CPU"),
    ],
)
def test_the_backend_and_the_reason(
    words: str, runs: str, told: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["kernels", *words.split()]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.strip().startswith(runs)]
    assert "runs" in line.split()
    assert told in printed


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown mask 'naavi': did you mean 'naavit'"):
        main(["kernels", "--mask", "naavi"])
    with pytest.raises(ConfigError, match="at least 8 tokens"):
        main(["kernels", "--length", "3"])


@pytest.mark.parametrize("mask", MASKS)
def test_every_example_has_the_shape_that_was_asked_for(mask: str) -> None:
    for length in (8, 9, 31, 700):
        assert example(mask, length, 2).shape == (2, length, length)


def test_few_heads_are_not_worth_many_calls() -> None:
    visibility = example("packed", 320)
    assert choose(visibility, Call(16, 64)).backend == "rectangles"
    assert choose(visibility, Call(1, 16)).backend == "sdpa"
