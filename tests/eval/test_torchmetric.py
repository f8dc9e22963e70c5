from __future__ import annotations

import pytest
import torch

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.torchmetric import ScorerMetric

ROWS = [{"id": str(i), "prediction": said, "target": "yes", "category": "ä\u2028" if i % 2 else "b"}
        for i, said in enumerate(["yes", "no", "Yes.", "yes\nno"])]  # fmt: skip


def test_batches_give_what_all_rows_give_together():
    metric = ScorerMetric("pope", "official")
    for start in (0, 1, 3):
        metric.update(ROWS[start : {0: 1, 1: 3, 3: 4}[start]])
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(score_rows("pope", ROWS, "official").values)
    metric.reset()
    with pytest.warns(UserWarning, match="before the"), pytest.raises(DataError, match="no rows"):
        metric.compute()


def test_rows_of_other_ranks_count_once():
    """What torchmetrics does when it joins ranks: each rank's tensors are gathered and concatenated."""
    metric, other = ScorerMetric("exact_match"), ScorerMetric("exact_match")
    metric.update(ROWS[:3])
    other.update(ROWS[2:])
    metric.rows = torch.cat([*metric.rows, *other.rows])
    assert float(metric.compute()["exact_match"]) == score_rows("exact_match", ROWS).values["exact_match"]


def test_an_unknown_task_is_refused_at_once():
    with pytest.raises(ConfigError, match="pop"):
        ScorerMetric("popes")
