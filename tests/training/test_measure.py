"""FLOPs, latencies and bytes of a cache, on models whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from mmfuse.fusion import FUSIONS
from mmfuse.testing import tiny_batch, tiny_model
from mmfuse.training.measure import cache_bytes, forward_flops, measure_run


class CacheWithMedia(DynamicCache):
    """Holds keys and values of media beside those of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.media = {0: (torch.zeros(1, 2, 3), torch.zeros(4, dtype=torch.float16))}


def test_bytes_are_those_of_all_layers_and_of_media() -> None:
    keys = torch.zeros(2, 4, 7, 8)
    for cache, more in ((DynamicCache(), 0), (CacheWithMedia(), 6 * 4 + 4 * 2)):
        for layer in range(3):
            cache.update(keys, keys, layer)
        assert cache_bytes(cache) == 3 * 2 * (2 * 4 * 7 * 8) * 4 + more


@pytest.mark.parametrize("name", FUSIONS)
def test_flops_grow_with_the_batch_and_leave_the_model_alone(name: str) -> None:
    model = tiny_model(fusion=name)
    model.train()
    backend = model.config.attention_backend
    batch = tiny_batch(model)
    whole = forward_flops(model, batch)
    assert whole > 2 * sum(p.numel() for p in model.decoder.model.layers.parameters())
    assert forward_flops(model, batch) == whole
    assert model.config.attention_backend == backend and model.training


def test_attention_is_counted() -> None:
    """Twice the length costs more than twice as much."""
    model = tiny_model(fusion="causal")
    lengths = [torch.ones(1, length, dtype=torch.long) for length in (32, 64)]
    short, long = (forward_flops(model, {"input_ids": ids, "labels": None}) for ids in lengths)
    assert long > 2 * short


def test_run_is_measured(finished: Path) -> None:
    cost = measure_run(finished, samples=1)
    assert cost.train_flops_per_sample > 1e6
    assert 0 < cost.generation.decode_seconds_per_token < 5
    assert 0 < cost.generation.prefill_seconds < 5
    # Two layers of two heads of 16 float32, keys and values.
    assert cost.generation.kv_bytes_per_sample % (2 * 2 * 2 * 16 * 4) == 0
