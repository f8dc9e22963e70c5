"""Timing with random weights, and its refusal where they do not fit."""

from __future__ import annotations

import copy

import pytest
import torch

from mmfuse.analysis.latency import check_memory, free_memory, measure_latency
from mmfuse.errors import RunError
from mmfuse.fusion import FUSIONS
from mmfuse.models import MultimodalLM
from mmfuse.testing import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_prefill_and_decoding_are_timed(fusion: str) -> None:
    latency = measure_latency(tiny_model(fusion), 5, 4, batch=2, device="cpu", runs=2)
    assert latency.device == f"cpu, {torch.get_num_threads()} threads"
    assert latency.runs == 2
    assert 0 < latency.decode_seconds < 5
    assert 0 < latency.prefill_seconds < 5


def test_a_longer_prompt_takes_longer() -> None:
    model = tiny_model(hidden_size=128, intermediate_size=512)
    short, long = (measure_latency(model, text, 0, device="cpu").prefill_seconds for text in (8, 1024))
    assert long > 2 * short


def test_a_model_without_weights_is_timed_and_left_alone() -> None:
    with torch.device("meta"):
        model = MultimodalLM(copy.deepcopy(tiny_model().config))
    measure_latency(model, 5, 4, device="cpu", runs=1)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RunError, match=r"they take 13\.0 GiB, and 15\.0 GiB are free on cpu\. Leave --latency out"):
        check_memory(13 * 2**30, 15 * 2**30, CPU)
    check_memory(12 * 2**30, 15 * 2**30, CPU)


def test_free_memory_of_this_machine() -> None:
    assert 2**20 < free_memory(CPU) < 2**50
