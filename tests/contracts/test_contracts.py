"""Contracts 2 to 8, which every fusion strategy keeps with every decoder, arrangement and backend of the design."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfuse.fusion import FUSIONS
from mmfuse.fusion.base import MediaPath
from mmfuse.models import MultimodalLM
from mmfuse.sequence import Modality, TokenMap
from mmfuse.testing import tiny_batch, tiny_model

Batch = dict[str, Any]

# Logits of these models go up to 4; a wrong mask moves them by 1e-2 and more, rounding by 3e-6.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def live_logits(model: MultimodalLM, batch: Batch) -> Tensor:
    """Logits of the tokens that are no padding, sample after sample: `[n, V]`."""
    return model(**batch).logits[~batch["tokens"].is_pad]


def singles(model: MultimodalLM, batch: Batch) -> Iterator[Batch]:
    """The samples of an unpacked batch, each alone and without padding."""
    tokens = batch["tokens"]
    for row in range(len(tokens.modality)):
        live = ~tokens.is_pad[row : row + 1]
        sample = {name: batch[name][row : row + 1, live[0]] for name in ("input_ids", "labels")}
        yield sample | {"tokens": tokens.rows(row).select(live)} | media_in(model, batch, rows=slice(row, row + 1))


def media_in(
    model: MultimodalLM, batch: Batch, rows: slice = slice(None), columns: slice = slice(None)
) -> dict[str, Tensor]:
    """The media, of whatever modality, whose first token stands in these rows and columns."""
    found = {}
    for modality, name in model.input_names.items():
        slots = (batch["tokens"].modality == Modality[modality.upper()]).nonzero()
        first = slots[:: model.visual_tokens(modality)]
        inside = torch.zeros(batch["tokens"].shape, dtype=torch.bool)
        inside[rows, columns] = True
        chosen = inside[first[:, 0], first[:, 1]]
        assert len(slots) == len(first) * model.visual_tokens(modality)
        if bool(chosen.any()):
            found[name] = batch[name][chosen]
    return found


def gradients(model: MultimodalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def cuts(tokens: TokenMap) -> list[int]:
    """Where decoding may split a sequence: before an answer token, and before the prompt that follows an answer."""
    answering = (tokens.is_answer | tokens.is_pad).all(0) & tokens.is_answer.any(0)
    after = torch.zeros_like(answering)
    after[1:] = answering[:-1]
    return (answering | after).nonzero().flatten().tolist()


# 2. prefill + decode with cache == full recompute


def test_cached_decoding_equals_recomputation(model: MultimodalLM, batch: Batch) -> None:
    tokens, ids = batch["tokens"], batch["input_ids"]
    with torch.no_grad():
        expected = model(**batch).logits
        bounds = [0, *cuts(tokens), len(tokens)]
        parts, cache, seen = [], None, 0
        for start, stop in pairwise(bounds):
            # Media are listed sample by sample: a chunk takes, of each row, those that stand in it.
            media = media_in(model, batch, columns=slice(start, stop))
            seen += sum(map(len, media.values()))
            out = model(ids[:, start:stop], tokens.columns(0, stop), **media, past_key_values=cache, use_cache=True)
            parts.append(out.logits)
            cache = out.past_key_values
    live = ~tokens.is_pad
    assert len(bounds) > 3
    assert seen == sum(len(batch.get(name, ())) for name in model.input_names.values())
    torch.testing.assert_close(torch.cat(parts, dim=1)[live], expected[live], **CLOSE)


# 3. batch == single; packed == unpacked


def test_batch_pack_and_single_samples_agree(model: MultimodalLM, arrange: Callable[..., Batch]) -> None:
    expected_logits, losses, counts = [], [], []
    for sample in singles(model, arrange(side="right", pack=False)):
        out = model(**sample)
        expected_logits.append(out.logits[0])
        losses.append(out.loss * out.supervised)
        counts.append(out.supervised)
    expected_loss = sum(losses) / sum(counts)
    expected_gradients = gradients(model, expected_loss)
    for batch in (arrange(side="right", pack=False), arrange(side="left", pack=False), arrange(pack=True)):
        out = model(**batch)
        torch.testing.assert_close(out.logits[~batch["tokens"].is_pad], torch.cat(expected_logits), **CLOSE)
        torch.testing.assert_close(out.loss, expected_loss, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model, out.loss).items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=2e-5, msg=name)


# 4. padding rows are finite and have no effect


def test_padding_has_no_effect(model: MultimodalLM, arrange: Callable[..., Batch]) -> None:
    for side in ("right", "left"):
        batch = arrange(side=side, pack=False)
        batch["tokens"] = batch["tokens"].pad(len(batch["tokens"]) + 2, side)
        for name in ("input_ids", "labels"):
            filler = torch.full((len(batch[name]), 2), 0 if name == "input_ids" else -100)
            batch[name] = torch.cat([batch[name], filler] if side == "right" else [filler, batch[name]], dim=1)
        padding = batch["tokens"].is_pad
        clean = model(**batch)
        clean_gradients = gradients(model, clean.loss)
        batch["input_ids"] = torch.where(padding, torch.randint(4, 64, padding.shape), batch["input_ids"])
        hook = model.get_input_embeddings().register_forward_hook(
            lambda _, __, out, padding=padding: out + 100.0 * padding.unsqueeze(-1)
        )
        changed = model(**batch)
        hook.remove()
        assert torch.isfinite(changed.logits).all()
        # Where media are no rows, padding is none either.
        computed = model.fusion.media_path is MediaPath.ROWS or not batch["tokens"].is_media.any()
        if computed and model.fusion.media_path is not MediaPath.ASIDE:
            assert not torch.allclose(changed.logits[padding], clean.logits[padding])
        assert torch.equal(changed.logits[~padding], clean.logits[~padding])
        assert torch.equal(changed.loss, clean.loss)
        for name, gradient in gradients(model, changed.loss).items():
            assert torch.equal(gradient, clean_gradients[name]), name


# 5. off == base


def test_off_is_the_base_bit_for_bit(fusion: str, family: str) -> None:
    base, off = tiny_model("causal", family), tiny_model({"type": fusion, "layers": []}, family)
    if off.fusion.media_path is MediaPath.ASIDE:
        assert_off_is_the_text_only_decoder(base, off)
        return
    for side in ("right", "left"):
        batch = tiny_batch(
            base, [[("text", 3), ("image", 4), ("text", 5), ("answer", 3)], [("text", 4), ("answer", 2)]], side=side
        )
        assert torch.equal(off(**batch).logits, base(**batch).logits)


def assert_off_is_the_text_only_decoder(base: MultimodalLM, off: MultimodalLM) -> None:
    """Of a batch whose samples have equally much text, so that what is left of it needs no other padding."""
    batch = tiny_batch(base, [[("text", 3), ("image", 4), ("text", 5), ("answer", 3)], [("text", 8), ("answer", 3)]])
    text = ~batch["tokens"].is_media & ~batch["tokens"].is_pad
    ids = batch["input_ids"][text].reshape(2, 11)
    tokens = TokenMap.batch([TokenMap.from_layout([("text", 8), ("answer", 3)])] * 2)
    assert torch.equal(off(**batch).logits[text].reshape(2, 11, -1), base(ids, tokens).logits)


def test_layers_choose_where_the_strategy_runs(fusion: str, family: str) -> None:
    specs: list[Any] = [
        {"type": fusion, "layers": []},
        {"type": fusion, "layers": [0]},
        {"type": fusion, "layers": [1]},
    ]
    logits = [live_logits(model, tiny_batch(model)) for model in (tiny_model(s, family) for s in [*specs, fusion])]
    both = tiny_model({"type": fusion, "layers": [0, 1]}, family)
    assert torch.equal(live_logits(both, tiny_batch(both)), logits[3])
    if fusion == "saisa":
        # Its first layer reads what a causal one reads and its second overwrites the rest: [1] is all of it here.
        assert torch.allclose(logits[2], logits.pop(), **CLOSE)
    if fusion != "causal":
        for i, first in enumerate(logits):
            for second in logits[i + 1 :]:
                assert (first - second).abs().max() > 1e-2


# 7. gradients reach every trainable parameter


def test_gradients_reach_every_parameter(fusion: str, family: str) -> None:
    model = tiny_model(fusion, family).train()
    found = gradients(model, model(**tiny_batch(model)).loss)
    for name, weight in model.named_parameters():
        if "vision_tower" in name and re.search(r"layers\.1\.|post_layernorm", name):
            continue  # LLaVA reads the tower's last layer but one
        assert weight.requires_grad and name in found, f"{name} gets no gradient"
        assert torch.isfinite(found[name]).all(), name
        # Softmax does not feel a bias that all keys share, unless positions turn it: the tower's is 0 by nature.
        if not (re.match(r"encoders|vlm.*vision_tower", name) and name.endswith("k_proj.bias")):
            assert found[name].abs().max() > 1e-7, f"{name} gets gradient 0"


# 8. save_pretrained -> from_pretrained


def test_saved_and_loaded_model_gives_equal_logits(fusion: str, family: str, tmp_path: Path) -> None:
    model = tiny_model({"type": fusion, "layers": [1]}, family)
    model.save_pretrained(tmp_path)
    loaded = MultimodalLM.from_pretrained(tmp_path)
    assert type(loaded.fusion) is FUSIONS[fusion]
    assert loaded.fusion.layers == (1,)
    assert not loaded.training
    batch = tiny_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
