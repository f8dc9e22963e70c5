"""What a model costs: FLOPs of a training sample, latency of prefill and decode, bytes of the cache.

FLOPs are those of the matrix products that the model executes, padding included; a multiplication and an addition are
two. Attention of the decoder is counted through the reference backend, so as dense, whatever the mask leaves empty:
torch counts no fused attention on CPUs, which also leaves out that inside vision towers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmfuse.analysis.mode import evaluation_mode
from mmfuse.analysis.profile import cache_bytes
from mmfuse.data import Sample, encode_sample, split_answer
from mmfuse.data.stream import NO_INPUTS
from mmfuse.fusion import Fusion
from mmfuse.models import MultimodalLM, MultimodalProcessor
from mmfuse.training.cli import parse_and_build
from mmfuse.training.data import MultimodalData
from mmfuse.training.explain import collated_batch
from mmfuse.training.inference import load_model
from mmfuse.training.module import MultimodalModule
from mmfuse.training.reporting import ADAPTER, MODEL

#: A backward pass computes two products for each of the forward pass: gradients of inputs, and of weights.
TRAINING_PASSES = 3


@dataclass(frozen=True)
class Generation:
    """What an answer costs, one sample at a time; seconds are medians, bytes the mean over samples.

    Attributes:
        prefill_seconds: for the prompt with its image.
        decode_seconds_per_token: for one more token behind it.
        kv_bytes_per_sample: what the cache holds after the prompt.
    """

    prefill_seconds: float
    decode_seconds_per_token: float
    kv_bytes_per_sample: int


@dataclass(frozen=True)
class Cost:
    """What a run's model costs.

    Attributes:
        train_flops_per_sample: mean over the samples of all stages; 3 × those of the forward pass, also where a part
            is frozen.
        generation: of an answer.
    """

    train_flops_per_sample: float
    generation: Generation


def measure_run(folder: Path, *, samples: int = 16) -> Cost:
    """Measure the model of a finished run on its own data, on a GPU if there is one.

    Args:
        folder: the run folder.
        samples: how many test samples are answered for the latencies.
    """
    cli = parse_and_build(["--config", str(folder / "config.yaml"), "--out", str(folder)], run=False)
    module, data = cli.model, cli.datamodule
    data.prepare_data()
    data.setup()
    steps = [stage.steps for stage in module.schedule.stages]
    by_stage = training_flops(module, data)
    mean = sum(count * flops for count, flops in zip(steps, by_stage, strict=True)) / sum(steps)
    questions = data.sources["test"]
    chosen = [questions[number] for number in range(min(samples, len(questions)))]
    saved = folder / (MODEL if module.plan is None else ADAPTER)
    return Cost(mean, measure_generation(*load_model(saved), chosen))


def training_flops(module: MultimodalModule, data: MultimodalData) -> list[float]:
    """FLOPs of one sample in each stage: 3 × those of the forward pass over the stage's first batch.

    Args:
        module: the network under its stages, with any weights.
        data: set up.
    """
    found = []
    for number, fusion in enumerate(module.stage_fusions):
        batch = collated_batch(module, data, number)
        size = len(batch["keys"])
        inputs = {name: value for name, value in batch.items() if name not in NO_INPUTS}
        found.append(TRAINING_PASSES * forward_flops(module.network, inputs, fusion) / size)
    return found


def forward_flops(model: MultimodalLM, inputs: dict[str, Any], fusion: Fusion | None = None) -> int:
    """FLOPs of one forward pass with its loss, as in training.

    Args:
        model: on the device of the inputs.
        inputs: of its forward pass, labels included.
        fusion: instead of the model's own.
    """
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), _countable_attention(model), counter:
        # An adopted model sends its images through the tower when it prepares the batch.
        model(**model.prepared(inputs), return_logits=False, fusion=fusion)
    return int(counter.get_total_flops())


@contextmanager
def _countable_attention(model: MultimodalLM) -> Iterator[None]:
    """Attention in matrix products that torch counts on every device."""
    backend = model.config.attention_backend
    model.config.attention_backend = "reference"
    try:
        yield
    finally:
        model.config.attention_backend = backend


def measure_generation(
    model: MultimodalLM,
    processor: MultimodalProcessor,
    samples: Sequence[Sample],
    *,
    new_tokens: int = 16,
    warmup: int = 3,
) -> Generation:
    """Time prefill and greedy decoding of each sample's last question.

    Args:
        model: where it is to be measured.
        processor: of that model.
        samples: dialogues that end with an answer, one or more.
        new_tokens: decoded behind each prompt; its length in training does not matter.
        warmup: how often the first sample is answered before the clock counts.
    """
    prefills: list[float] = []
    decodes: list[float] = []
    sizes: list[int] = []
    with evaluation_mode(model), torch.inference_mode():
        for number, sample in enumerate([*[samples[0]] * warmup, *samples]):
            prompt, _ = split_answer(sample)
            encoded = encode_sample(prompt, processor.encoder, generation=True)
            batch = processor.collate([encoded], side="left", supervised=False)
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            prefill, size, decode = _answer(model, inputs, new_tokens)
            if number >= warmup:
                prefills.append(prefill)
                sizes.append(size)
                decodes += decode
    return Generation(statistics.median(prefills), statistics.median(decodes), round(statistics.fmean(sizes)))


def _answer(model: MultimodalLM, inputs: dict[str, Any], new_tokens: int) -> tuple[float, int, list[float]]:
    """Seconds of the prefill, bytes of its cache, and seconds of each token behind it."""
    output, prefill = _timed(model, inputs)
    size, tokens = cache_bytes(output.past_key_values), model.prepared(inputs)["tokens"]
    seconds = []
    for _ in range(new_tokens):
        tokens = tokens.append(1)
        step = {"input_ids": output.logits[:, -1:].argmax(-1), "tokens": tokens}
        output, elapsed = _timed(model, {**step, "past_key_values": output.past_key_values})
        seconds.append(elapsed)
    return prefill, size, seconds


def _timed(model: MultimodalLM, inputs: dict[str, Any]) -> tuple[Any, float]:
    _wait_for(model.device)
    begun = time.perf_counter()
    output = model(**model.prepared(inputs), use_cache=True, logits_to_keep=1)
    _wait_for(model.device)
    return output, time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
