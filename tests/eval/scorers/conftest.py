"""Short forms for the tests of scorers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmfuse.eval.scorers import Sample, score_rows

One = Callable[..., Sample]


@pytest.fixture
def one() -> One:
    """Scores a single row: `one("pope", "official", "Yes.", "yes")`."""

    def call(task: str, protocol: str, prediction: Any, target: Any, **fields: Any) -> Sample:
        row = {"id": "1", "prediction": prediction, "target": target, **fields}
        return score_rows(task, [row], protocol).samples[0]

    return call
