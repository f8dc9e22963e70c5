"""Evaluation: questions asked of a model, scores that can be trusted, and the files of a run."""

from mmfuse.eval.questions import Prediction, answer_questions, normalise, plain_image
from mmfuse.eval.report import Picture, write_report
from mmfuse.eval.results import provenance, write_results
from mmfuse.eval.scores import Score, exact_match, majority_answers, per_digit, score

__all__ = [
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
    "write_report",
    "write_results",
]
