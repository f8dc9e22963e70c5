"""How long a model's decoder takes at a given shape, with weights of the right size and no meaning."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import Cache

from mmfuse.analysis.workload import Workload, copy_with, random_embeds, workload_tokens
from mmfuse.errors import RunError
from mmfuse.models import MultimodalLM

#: Memory for each byte of weights: beside them stand the cache, a layer's activations and what an allocator wastes.
HEADROOM = 1.2


@dataclass(frozen=True)
class Latency:
    """Median times over `runs` runs, of the decoder and the logits of the last token.

    Attributes:
        device: where it was measured.
        prefill_seconds: one pass over the whole batch that fills a cache.
        decode_seconds: one more token for each sample.
        runs: how often each was measured, after one run that does not count.
    """

    device: str
    prefill_seconds: float
    decode_seconds: float
    runs: int


@torch.inference_mode()
def measure_latency(
    model: MultimodalLM, text: int, visual: int, *, batch: int = 1, device: str | None = None, runs: int = 5
) -> Latency:
    """Time prefill and decoding of a model's decoder under its own fusion, without its encoders.

    The model is not touched: a copy of it, in its dtype, gets random weights on `device`.

    Args:
        model: may be on the meta device.
        text: text tokens of a sample, at least 1.
        visual: media tokens of a sample.
        batch: samples.
        device: a GPU if there is one, else the CPU.
        runs: how often each time is measured.

    Raises:
        ConfigError: a count that is too small.
        RunError: the weights do not fit into the memory that is free.
    """
    tokens = workload_tokens(model, text, visual, batch)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_memory(sum(parameter.nbytes for parameter in model.parameters()), free_memory(place), place)
    real = copy_with(model, lambda tensor: _random_like(tensor, place)).eval()
    prompt = Workload.random(real, tokens.to(place))
    prefills = [_seconds(lambda: _step(real, prompt, real.new_cache()), place) for _ in range(runs + 1)]
    decodes = _decode(real, prompt, runs + 1, place)
    # The first of each warms up.
    return Latency(_name(place), median(prefills[1:]), median(decodes[1:]), runs)


def check_memory(needed: int, free: int, device: torch.device) -> None:
    """Raise RunError if weights of `needed` bytes do not fit into `free` bytes with some room to spare."""
    if needed * HEADROOM > free:
        raise RunError(
            f"latency is measured with real weights: they take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            f"are free on {device.type}. Leave --latency out, or measure where there is more memory"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a GPU, or on the CPU what the system calls available.

    Raises:
        RunError: this system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        raise RunError("this system does not say how much memory is free, so no weights are put there for --latency")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _random_like(tensor: Tensor, device: torch.device) -> Tensor:
    """As in a fresh model: memory as it comes may hold NaN, and denormal numbers, which are slow."""
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device=device)
    return torch.empty_like(tensor, device=device).normal_(std=0.02)


def _step(model: MultimodalLM, work: Workload, cache: Cache) -> Tensor:
    """Logits `[B, vocabulary]` behind the last token."""
    logits: Tensor = model.get_output_embeddings()(work.run(model, cache)[:, -1])
    return logits


def _decode(model: MultimodalLM, prompt: Workload, steps: int, device: torch.device) -> list[float]:
    """Seconds of each of the `steps` tokens behind a prompt."""
    cache, tokens, times = model.new_cache(), prompt.tokens, []
    _step(model, prompt, cache)
    for _ in range(steps):
        tokens = tokens.append(1)
        work = Workload(tokens, random_embeds(model, tokens.shape[0], 1))
        times.append(_seconds(partial(_step, model, work, cache), device))
    return times


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
