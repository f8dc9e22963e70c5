"""Any scorer as a torchmetrics metric, for training loops of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mmfuse.eval.scorers import find_scorer, score_rows
from mmfuse.eval.scorers.records import Row


class ScorerMetric(Metric):
    """Gathers rows, over all ranks too, and scores them together when it is computed.

    Rows travel between ranks as the bytes of their JSON. Where a sampler has padded the ranks with samples that others
    have, each id counts once, so that the numbers do not depend on how many ranks there are.

    Args:
        task: a scorer, as `mmfuse score --task` names it.
        protocol: whose rules; the task's first one if None.
        **settings: of torchmetrics.

    Raises:
        ConfigError: there is no such task.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    rows: list[Tensor] | Tensor

    def __init__(self, task: str, protocol: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.task = find_scorer(task).name
        self.protocol = protocol
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, rows: Sequence[Row]) -> None:
        """Add rows with `id`, `prediction`, `target` and the fields of the task."""
        data = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows).encode()
        assert isinstance(self.rows, list)
        self.rows.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """All metrics by name, the primary one first; NaN where one is not defined.

        Raises:
            DataError: no rows, or rows that the scorer cannot use.
        """
        held = self.rows if isinstance(self.rows, list) else [self.rows]
        text = b"".join(part.cpu().numpy().tobytes() for part in held).decode()
        by_id: dict[str, Row] = {}
        for row in map(json.loads, text.split("\n")[:-1]):
            by_id.setdefault(str(row.get("id")), row)
        values = score_rows(self.task, list(by_id.values()), self.protocol).values
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
