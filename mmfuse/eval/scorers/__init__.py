"""Scorers: from rows with predictions to metrics, by the rules of a named protocol.

`score_rows("pope", rows, "official")` takes rows `{"id", "prediction", "target", …}` and returns a `Result`: a `Sample`
for each row (its score, what was parsed, by which rule) and metrics as sums over samples, see `records`. `SCORERS` is
the table of tasks. A scorer is a pure function: no files, no network, no global random numbers.
"""

from mmfuse.eval.scorers.records import Metric, Result, Row, Sample
from mmfuse.eval.scorers.table import PROTOCOLS, SCORERS, Scorer, TaskScorer, find_scorer, score_rows

__all__ = [
    "PROTOCOLS",
    "SCORERS",
    "Metric",
    "Result",
    "Row",
    "Sample",
    "Scorer",
    "TaskScorer",
    "find_scorer",
    "score_rows",
]
