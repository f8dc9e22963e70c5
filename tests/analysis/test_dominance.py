from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.analysis.dominance import dominance_index, efficiency_index, modality_dominance
from mmfuse.testing import tiny_batch, tiny_model

SHARE = st.floats(0.01, 0.99)


@given(SHARE)
def test_uniform_attention_favours_nobody(share):
    share = torch.tensor(share, dtype=torch.float64)
    assert float(dominance_index(share, share)) == pytest.approx(1)
    assert float(efficiency_index(share, share)) == pytest.approx(1)


@given(SHARE, SHARE)
def test_aei_follows_from_mdi(attention, tokens):
    a, q = (torch.tensor(x, dtype=torch.float64) for x in (attention, tokens))
    mdi = float(dominance_index(a, q))
    assert float(efficiency_index(a, q)) == pytest.approx(mdi / (1 + tokens * (mdi - 1)))


@pytest.mark.parametrize("skip_first", [False, True])
def test_a_model_that_attends_evenly_has_mdi_and_aei_of_one(skip_first):
    model = tiny_model("causal")
    for layer in model.decoder.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    # One answer token: all its rows see the same tokens, so the mean of shares is the share of means.
    batch = tiny_batch(model, [("text", 3), ("image", 8), ("text", 2), ("answer", 1)])
    found = modality_dominance(model, batch, skip_first=skip_first)
    assert found.mdi.tolist() == pytest.approx([1, 1])
    assert found.aei["image"].tolist() == pytest.approx([1, 1])
    assert float(found.token_share) == pytest.approx((4 if skip_first else 5) / (12 if skip_first else 13))
    assert found.groups() == pytest.approx({"early": 1, "middle": 1})


@pytest.mark.parametrize("fusion", ["causal", "mma"])
def test_shares_are_those_of_the_weights_and_padding_changes_nothing(fusion):
    model = tiny_model(fusion)
    layouts = [[("text", 3), ("image", 4), ("text", 4), ("answer", 3)], [("image", 8), ("text", 2), ("answer", 1)]]
    batch = tiny_batch(model, layouts)
    found = modality_dominance(model, batch)
    kept = []
    model(**batch, record=lambda layer, weights: kept.append(weights))
    tokens = batch["tokens"]
    shares = []
    for row, column in ((0, 10), (0, 11), (0, 12), (1, 9)):
        media = tokens.is_media[row]
        shares.append(1 - kept[1][row, :, column, :][:, media].sum(1).mean())
    assert float(found.text_share[1]) == pytest.approx(float(torch.stack(shares).mean()), abs=1e-6)
    left = modality_dominance(model, tiny_batch(model, layouts, side="left"))
    assert left.mdi.tolist() == pytest.approx(found.mdi.tolist(), rel=1e-4)


def test_what_cannot_be_compared_is_refused():
    model = tiny_model("causal")
    with pytest.raises(ValueError, match="hold their answers"):
        modality_dominance(model, tiny_batch(model, [("image", 4), ("text", 3)]))
    with pytest.raises(ValueError, match="tokens of both"):
        modality_dominance(model, tiny_batch(model, [("text", 3), ("answer", 2)]))
