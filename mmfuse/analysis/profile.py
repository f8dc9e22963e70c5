"""What a model costs at any shape, measured without its weights: FLOPs, parameters, cache and activation memory.

The model is copied with fake tensors: torch's meta tensors with a device. They have a shape, a dtype and no data, so a
model of 7B parameters is profiled in seconds. Masks are data, so the TokenMap and what strategies compute of it are
real; attention is the one step that reads both, and `CountingAttention` takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache

from mmfuse.analysis.workload import Workload, copy_with, workload_tokens
from mmfuse.errors import unknown
from mmfuse.fusion import DecoderShape
from mmfuse.kernels import Call, Visibility, choose, rectangle_cover
from mmfuse.models import MultimodalLM
from mmfuse.models.encoders import Encoder


@dataclass(frozen=True)
class Profile:
    """The cost of one forward pass (a prefill) over a batch, unless an attribute says otherwise.

    Attributes:
        convention_flops: decoder layers, by the closed formula of the strategy's paper.
        executed_flops: matrix products that mmfuse runs in the decoder, with what the strategy adds to its layers.
        kv_bytes: keys and values that the prefill leaves for decoding.
        activation_bytes: what the decoder keeps for the backward pass of a training step, parameters excluded, if
            attention keeps its inputs and its output and no scores.
        checkpointed_activation_bytes: the same with activation checkpointing of every layer; without the state of media
            that a checkpointed layer is given beside its rows.
        parameters: of each part of the model.
        encoder_flops: all encoders on one medium each, of as many tokens as an encoder gives.
        connector_flops: all connectors behind them.
        lm_head_flops: logits of all text tokens.
        lm_head_last_flops: logits of the last token of each sample alone, as in generation.
    """

    convention_flops: int
    executed_flops: int
    kv_bytes: int
    activation_bytes: int
    checkpointed_activation_bytes: int
    parameters: Mapping[str, int]
    encoder_flops: int
    connector_flops: int
    lm_head_flops: int
    lm_head_last_flops: int


def profile_model(model: MultimodalLM, text: int, visual: int, *, batch: int = 1) -> Profile:
    """Profile a model under its own fusion, in its own dtype.

    The model is not touched; it may hold weights or be on the meta device. Frozen parameters save activations.

    Args:
        model: any model of ours.
        text: text tokens of a sample, at least 1.
        visual: media tokens of a sample, behind the first text token, whatever the encoder gives for one medium.
        batch: samples.

    Raises:
        ConfigError: a count that is too small.
    """
    bare, work = without_data(model, text, visual, batch)
    cache = bare.new_cache()
    executed = _decoder_flops(bare, work, cache)
    kept = _activation_bytes(bare, work)
    bare.activation_checkpointing_enable()
    encoder, connector = _media_flops(bare.eval(), work)
    return Profile(
        convention_flops=batch * bare.fusion.convention_flops(DecoderShape.of(bare.config.text_config), text, visual),
        executed_flops=executed,
        kv_bytes=cache_bytes(cache),
        activation_bytes=kept,
        checkpointed_activation_bytes=_activation_bytes(bare, work),
        parameters={name: sum(p.numel() for p in part.parameters()) for name, part in bare.parts().items()},
        encoder_flops=encoder,
        connector_flops=connector,
        lm_head_flops=_head_flops(bare, work, text),
        lm_head_last_flops=_head_flops(bare, work, 1),
    )


def training_flops(model: MultimodalLM, text: int, visual: int) -> int:
    """FLOPs of the decoder in one training step on one sample, about: three times what a forward pass executes.

    For each matrix product of the forward pass the backward pass has two, the gradients of both factors. A frozen
    weight needs one of them, and activation checkpointing runs the forward pass once more; neither is considered.
    """
    return 3 * _decoder_flops(*without_data(model, text, visual))


def without_data(model: MultimodalLM, text: int, visual: int, batch: int = 1) -> tuple[MultimodalLM, Workload]:
    """A copy of a model, in evaluation mode, and a workload for it; their tensors hold no data, but the map is real."""
    tokens = workload_tokens(model, text, visual, batch)
    # Outside of the mode its tensors stay fake, and what is computed of real ones alone stays real.
    with FakeTensorMode(allow_non_fake_inputs=True):
        bare = copy_with(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)).eval()
    return bare, Workload.random(bare, tokens)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values in a cache, and of the media that a cache keeps apart in `media`."""
    tensors = [tensor for layer in cast(Any, cache.layers) for tensor in (layer.keys, layer.values)]
    tensors += [tensor for kept in getattr(cache, "media", {}).values() for tensor in kept]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class CountingAttention:
    """Called as `attend` is, with tensors without data: computes nothing, and counts what the backend would have.

    Attributes:
        flops: summed over calls.
    """

    def __init__(self) -> None:
        self.flops = 0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        *,
        scale: float | None = None,
        mass: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        call = Call.of(q, k, v, mass)
        if backend == "auto":
            # Tensors here have no data; what is profiled is what a CPU would run.
            backend = choose(visibility, replace(call, device="cpu")).backend
        self.flops += attention_flops(visibility, q.shape[1], q.shape[3], backend, with_mass=mass is not None)
        out: Tensor = _ShapeOfAttention.apply(q, k, v)
        return out


def attention_flops(visibility: Visibility, heads: int, width: int, backend: str, *, with_mass: bool = False) -> int:
    """FLOPs that a backend of `attend` executes: `4 · heads · width` for each pair of query and key.

    `reference` computes all pairs, and so does `flex` on the CPU. So does `sdpa`, except that its causal kernel leaves
    out those above the diagonal: `n(n + 1)/2` of `n²` are left. `rectangles` computes visible pairs alone. (Kernels
    work in tiles, and compute whole those that the diagonal crosses.) A mass is one more key and one more column of q,
    k and v for `sdpa`. `auto` is what it chooses for a float32 call on the CPU.

    Raises:
        ValueError: what this backend executes is not known.
    """
    if backend == "auto":
        backend = choose(visibility, Call(heads, width, with_mass=with_mass)).backend
    known = ("reference", "sdpa", "rectangles", "flex")
    if backend not in known:
        raise ValueError(unknown("cost of attention backend", backend, ("auto", *known)))
    samples, queries, keys = visibility.shape
    pairs = samples * queries * keys
    if backend == "rectangles":
        pairs = rectangle_cover(visibility).pairs
    elif backend == "sdpa" and with_mass:
        pairs, width = samples * queries * (keys + 1), width + 1
    elif backend == "sdpa" and not visibility.is_full() and visibility.is_causal():
        pairs = samples * queries * (queries + 1) // 2
    return 4 * heads * width * pairs


class _ShapeOfAttention(torch.autograd.Function):
    """A tensor of the output's shape, for which autograd keeps what fused kernels keep: q, k, v, output and LSE."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Laid out as [B, Sq, H, D], like the fused kernels' own.
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Counts matrix products; attention outside of the decoder is written out, since not every fused one is counted."""
    # With a graph: under `no_grad` the counter's hooks fail on views of fake parameters.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _decoder_flops(model: MultimodalLM, work: Workload, cache: Cache | None = None) -> int:
    attention = CountingAttention()
    with counted() as counter:
        work.run(model, cache, attention)
    return int(counter.get_total_flops()) + attention.flops


def _media_flops(model: MultimodalLM, work: Workload) -> tuple[int, int]:
    """Of the encoders on one medium each, and of the connectors behind them."""
    encoders = connectors = 0
    for name, module in model.encoders.items():
        encoder = cast(Encoder, module)
        inputs = work.embeds.new_empty(1, *encoder.input_shape)
        with counted() as counter:
            features = encoder(inputs)
        encoders += int(counter.get_total_flops())
        with counted() as counter:
            model.connectors[name](features)
        connectors += int(counter.get_total_flops())
    return encoders, connectors


def _head_flops(model: MultimodalLM, work: Workload, rows: int) -> int:
    with counted() as counter:
        model.get_output_embeddings()(work.embeds[:, :rows])
    return int(counter.get_total_flops())


def _activation_bytes(model: MultimodalLM, work: Workload) -> int:
    """Bytes of the storages that the decoder's autograd graph keeps alive in training."""
    model.train()
    work = replace(work, embeds=work.embeds.detach().requires_grad_())
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views share a storage, which counts once.
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work.run(model, attention=CountingAttention())
    for parameter in model.parameters():
        kept.pop(id(parameter.untyped_storage()), None)
    return sum(storage.nbytes() for storage in kept.values())
