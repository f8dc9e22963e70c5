"""Sinks, heads and exits: against sums written out, and on models that are known to be blind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.analysis.exits import media_until
from mmfuse.analysis.heads import head_divergence, head_outputs
from mmfuse.analysis.sinks import SINK, sink_share, visual_sinks
from mmfuse.fusion import FUSIONS
from mmfuse.testing import tiny_batch, tiny_model

LAYOUT = [("text", 3), ("image", 8), ("text", 3), ("answer", 2)]


def logits(model, batch, layer=None):
    own = {name: value for name, value in batch.items() if name != "labels"}
    with torch.inference_mode():
        if layer is None:
            return model(**own).logits[:, -3:]
        with media_until(model, layer, batch["tokens"]) as fusion:
            return model(**own, fusion=fusion).logits[:, -3:]


def other_image(batch):
    return {**batch, "pixel_values": batch["pixel_values"].flip(-1) * -2.0}


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_media_that_no_layer_sees_change_nothing_and_all_layers_are_the_model_itself(fusion):
    model = tiny_model(fusion)
    batch = tiny_batch(model, LAYOUT, batch=1)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    assert torch.equal(logits(model, batch, 2), logits(model, batch))
    hidden = logits(model, batch, 0)
    assert torch.equal(hidden, logits(model, other_image(batch), 0)), "hidden media were seen"
    assert not torch.allclose(logits(model, batch), logits(model, other_image(batch))), "the model is blind"
    assert not torch.allclose(logits(model, batch, 1), hidden), "the first layer has read nothing"
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_hidden_media_are_those_of_the_plain_mask():
    model = tiny_model("causal")
    batch = tiny_batch(model, LAYOUT, batch=2)
    seen = []
    with torch.inference_mode(), media_until(model, 1, batch["tokens"]) as fusion:
        model(**batch, fusion=fusion, record=lambda layer, weights: seen.append(weights))
    media = batch["tokens"].is_media
    text = ~media[0]
    assert float(seen[0][0][:, text][:, :, media[0]].sum()) > 0.1
    assert float(seen[1][0][:, text][:, :, media[0]].sum()) == 0
    rows = seen[1][0][:, text].sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-6)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=40), st.floats(0.1, 10))
def test_the_share_of_sinks_is_the_sum_over_those_above_the_mean(received, scale):
    mean = sum(received) / len(received)
    # A token that receives just SINK times the mean may fall on either side.
    received = [x for x in received if abs(x / mean - SINK) > 1e-6]
    if not received:
        return
    mean = sum(received) / len(received)
    expected = sum(x for x in received if x > SINK * mean) / sum(received)
    values = torch.tensor(received, dtype=torch.float64)
    assert float(sink_share(values * scale)) == pytest.approx(expected)


def test_even_attention_has_no_sinks_and_a_token_that_takes_all_is_one():
    assert float(sink_share(torch.ones(20))) == 0
    assert float(sink_share(torch.zeros(20))) == 0
    peak = torch.zeros(20).index_fill(0, torch.tensor([3]), 2.0)
    assert float(sink_share(peak)) == 1
    model = tiny_model("causal")
    for layer in model.decoder.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    assert visual_sinks(model, tiny_batch(model, LAYOUT)).tolist() == [[0.0, 0.0]] * 2
    with pytest.raises(ValueError, match="media and an answer"):
        visual_sinks(model, tiny_batch(model, [("text", 3), ("answer", 2)]))


def test_sinks_are_found_in_the_weights_of_answer_rows():
    model = tiny_model("mma")
    batch = tiny_batch(model, [("text", 3), ("image", 32), ("text", 3), ("answer", 2)], batch=1)
    kept = []
    model(**batch, record=lambda layer, weights: kept.append(weights))
    for layer, weights in enumerate(kept):
        received = weights[0, :, 37:39, 3:35].sum((0, 1)).tolist()
        mean = sum(received) / 32
        expected = sum(x for x in received if x > SINK * mean) / sum(received)
        assert float(visual_sinks(model, batch)[0, layer]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_heads_of_a_blind_model_do_not_react(fusion):
    model = tiny_model(fusion)
    batch = tiny_batch(model, [("image", 4), ("text", 3)], batch=1)
    seen, other = head_outputs(model, batch), head_outputs(model, other_image(batch))
    apart, relative = head_divergence(seen, other)
    assert apart.shape == relative.shape == (2, 4) and float(apart[-1].min()) > 0
    for connector in model.connectors.values():
        for parameter in connector.parameters():
            parameter.data.zero_()
    for parameter in model.fusion.parameters():
        parameter.data.zero_()
    blind, _ = head_divergence(head_outputs(model, batch), head_outputs(model, other_image(batch)))
    assert float(blind.max()) == 0


def test_head_outputs_are_those_of_weights_and_values():
    model = tiny_model("causal")
    batch = tiny_batch(model, [("image", 4), ("text", 3)], batch=1)
    values, weights = [], []
    layer = model.decoder.model.layers[0]
    hook = layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out))
    model(**batch, record=lambda index, own: weights.append(own))
    hook.remove()
    v = values[0][0].unflatten(-1, (2, 8)).repeat_interleave(2, dim=1)
    expected = torch.einsum("hk,khd->hd", weights[0][0, :, -1], v)
    assert torch.allclose(head_outputs(model, batch)[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="one sample"):
        head_outputs(model, tiny_batch(model, LAYOUT, batch=2))
