"""Evaluation: questions asked of a model, scores that can be trusted, and the files of a run.

A public name is imported when it is first used (PEP 562), so that scoring a file of predictions costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfuse.eval.questions import Prediction, answer_questions, plain_image
    from mmfuse.eval.report import Picture, write_report
    from mmfuse.eval.results import provenance, write_results
    from mmfuse.eval.scorers import SCORERS, score_rows
    from mmfuse.eval.scores import Score, exact_match, majority_answers, per_digit, score
    from mmfuse.eval.text import normalise

__all__ = [
    "SCORERS",
    "Picture",
    "Prediction",
    "Score",
    "answer_questions",
    "exact_match",
    "majority_answers",
    "normalise",
    "per_digit",
    "plain_image",
    "provenance",
    "score",
    "score_rows",
    "write_report",
    "write_results",
]

_HOME = {
    "SCORERS": "mmfuse.eval.scorers",
    "Picture": "mmfuse.eval.report",
    "Prediction": "mmfuse.eval.questions",
    "Score": "mmfuse.eval.scores",
    "answer_questions": "mmfuse.eval.questions",
    "exact_match": "mmfuse.eval.scores",
    "majority_answers": "mmfuse.eval.scores",
    "normalise": "mmfuse.eval.text",
    "per_digit": "mmfuse.eval.scores",
    "plain_image": "mmfuse.eval.questions",
    "provenance": "mmfuse.eval.results",
    "score": "mmfuse.eval.scores",
    "score_rows": "mmfuse.eval.scorers",
    "write_report": "mmfuse.eval.report",
    "write_results": "mmfuse.eval.results",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mmfuse.eval' has no attribute {name!r}", name=name, obj=None)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
