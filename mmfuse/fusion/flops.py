"""FLOPs of decoder layers as the papers count them: closed formulas, one layer and one sample each.

The convention: a multiply-add is 2 FLOPs; attention scores are dense, so causality saves nothing; the feed-forward
network is gated (three matrices); norms, softmax, rotary embeddings, residuals, biases, token embeddings and the
language-model head are not counted. What mmfuse itself executes is measured by `mmfuse.analysis.profile_model`.

Symbols: `t` text tokens, `v` visual tokens, `n = t + v`, `d` hidden size, `m` intermediate size, `q` = heads × head
width, `k` = key heads × head width. With `q = k = d` the formulas are the printed ones.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from mmfuse.fusion.shape import DecoderShape


def causal_flops(shape: DecoderShape, text: int, visual: int) -> int:
    """All tokens are rows of the layer: `2nd(2q + 2k) + 4n²q + 6ndm`, which is `2n(4d + 3m)d + 4n²d` under MHA.

    LLaVA, and every strategy that changes the mask alone (AKI, prefix-LM). Source: ShortV (arXiv 2504.00502), whose
    8.5 TFLOPs for LLaVA-1.5-7B are 64 text and 576 visual tokens.
    """
    tokens = text + visual
    queries_and_output, keys_and_values = 2 * _query_width(shape), 2 * _key_width(shape)
    return (
        matmul_flops(tokens, shape.hidden_size, queries_and_output + keys_and_values)
        + _score_flops(shape, tokens, tokens)
        + _feed_forward_flops(shape, tokens)
    )


def text_stream_flops(
    shape: DecoderShape,
    text: int,
    visual: int,
    *,
    value_output: bool = False,
    ffn: bool = False,
    projector: int = 0,
) -> int:
    """Only text issues queries; media give keys and values: `4tdq + 4ndk + 4tnq + 6tdm` and what media get.

    Without options: NAAViT, and a layer that ShortV (arXiv 2504.00502) freezes. With a projector: SAISA (arXiv
    2502.02458). With `value_output` and `ffn`: EE-MLLM (arXiv 2408.11795), derived from its description.

    Args:
        shape: the decoder.
        text: t.
        visual: v.
        value_output: media add `O(V(LN x))`, whose values are those that text reads: `2vdq`.
        ffn: media go through the feed-forward network: `6vdm`.
        projector: FLOPs for each visual token of a projector that every layer has for itself, see `mlp_flops`.
    """
    text_rows = (
        matmul_flops(text, shape.hidden_size, 2 * _query_width(shape))
        + _score_flops(shape, text, text + visual)
        + _feed_forward_flops(shape, text)
    )
    keys_and_values = matmul_flops(text + visual, shape.hidden_size, 2 * _key_width(shape))
    update = matmul_flops(visual, _query_width(shape), shape.hidden_size) if value_output else 0
    update += _feed_forward_flops(shape, visual) if ffn else 0
    return text_rows + keys_and_values + update + visual * projector


def cross_attention_flops(
    shape: DecoderShape, text: int, visual: int, *, media_width: int, inner: int = 512, ff_mult: int = 4
) -> int:
    """What a gated cross-attention block adds: `4tdI + 4v·d_v·I + 4tvI + 4·ff_mult·td²`.

    The layer behind it is `causal_flops(shape, text, 0)`, with or without a block. Source: `GatedCrossAttentionBlock`
    of OpenFlamingo (arXiv 2308.01390; Flamingo, arXiv 2204.14198, §2.2), `ff_mult` 4, eight heads of 64.

    Args:
        shape: the decoder.
        text: t.
        visual: v, the media tokens that the block reads.
        media_width: d_v.
        inner: I, heads × head width of the block.
        ff_mult: hidden width of its feed-forward network (two matrices), in multiples of d.
    """
    queries_and_output = matmul_flops(text, shape.hidden_size, 2 * inner)
    keys_and_values = matmul_flops(visual, media_width, 2 * inner)
    scores = 4 * text * visual * inner
    feed_forward = 2 * matmul_flops(text, shape.hidden_size, ff_mult * shape.hidden_size)
    return queries_and_output + keys_and_values + scores + feed_forward


def hyper_attention_flops(shape: DecoderShape, text: int, visual: int) -> int:
    """What hyper attention adds: `4vdk + 4tvq`, keys and values of media and the scores of text against them.

    The layer itself is `causal_flops(shape, text, 0)`, whose queries it shares. Source: the released model of
    mPLUG-Owl3 (arXiv 2408.04840); its two versions, gated and in one softmax, cost the same by this convention.
    """
    return matmul_flops(visual, shape.hidden_size, 2 * _key_width(shape)) + _score_flops(shape, text, visual)


def moda_flops(
    shape: DecoderShape,
    text: int,
    visual: int,
    *,
    directions: Collection[str] = ("media", "text"),
    concat: bool = False,
) -> int:
    """A causal layer whose keys are aligned, with dh the width of a head: `causal + 2k·dh(t + 2v)` for media.

    In each key head a Gram matrix `[dh, dh]` of the text (`2t·dh²`), visual keys through it and through the fuser
    (`2v·dh²` each). Source: the official code of MODA (arXiv 2507.04635); eq. 5 of the paper writes one Gram matrix
    `[d, d]` instead.

    Args:
        shape: the decoder.
        text: t.
        visual: v.
        directions: whose keys are aligned, `media` or `text`; for text the two counts change places.
        concat: the fuser takes keys and aligned keys side by side, and is twice as wide.
    """
    fused = 2 if concat else 1
    tokens = text + (1 + fused) * visual if "media" in directions else 0
    tokens += visual + (1 + fused) * text if "text" in directions else 0
    return causal_flops(shape, text, visual) + matmul_flops(tokens, shape.head_dim, _key_width(shape))


def matmul_flops(rows: int, inner: int, columns: int) -> int:
    """A matrix `[rows, inner]` times `[inner, columns]`."""
    return 2 * rows * inner * columns


def mlp_flops(*widths: int) -> int:
    """One token through Linear layers of these widths, such as `mlp_flops(1024, 4096, 4096)` for LLaVA-1.5."""
    return sum(matmul_flops(1, wide, wider) for wide, wider in pairwise(widths))


def _query_width(shape: DecoderShape) -> int:
    return shape.heads * shape.head_dim


def _key_width(shape: DecoderShape) -> int:
    return shape.kv_heads * shape.head_dim


def _score_flops(shape: DecoderShape, queries: int, keys: int) -> int:
    """Scores and weighted values of every pair."""
    return 4 * queries * keys * _query_width(shape)


def _feed_forward_flops(shape: DecoderShape, rows: int) -> int:
    return matmul_flops(rows, shape.hidden_size, 3 * shape.intermediate_size)
