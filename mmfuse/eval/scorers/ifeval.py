"""IFEval: are instructions followed that a rule can check?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmfuse.errors import DataError
from mmfuse.eval.scorers.records import Metric, Result, Row, Sample, clusters, identity, mean, ratio, required, text
from mmfuse.eval.text.instructions import follows


def ifeval(rows: Sequence[Row], protocol: str) -> Result:
    """IFEval (Zhou et al. 2023): the four official accuracies, of prompts and of instructions, strict and loose.

    Rows have `instruction_id_list` and `kwargs` as in the official file. Loose takes the best of eight forms of the
    answer: without its first line, its last one or both, each also without asterisks. What needs the language of the
    answer is checked with langdetect, seeded, if that is installed; otherwise these instructions, and the prompts that
    hold one, are left out, and a warning counts them. Sentences are counted by rule instead of by NLTK's model.
    """
    samples, strict, loose = [], [], []
    for row in rows:
        names, settings = _instructions(row)
        forms = loose_forms(text(row))
        checked = [_check(row, forms, name, own) for name, own in zip(names, settings, strict=True)]
        strict.append([own[0] for own in checked])
        loose.append([own[1] for own in checked])
        whole = _whole(strict[-1])
        score = None if whole is None else float(whole)
        failed = ", ".join(name for name, held in zip(names, strict[-1], strict=True) if held is False)
        samples.append(Sample(identity(row), score, failed, "instructions", clusters(row)))
    metrics = {
        "prompt_level_strict_acc": mean(map(_whole, strict)),
        "inst_level_strict_acc": _parts(strict),
        "prompt_level_loose_acc": mean(map(_whole, loose)),
        "inst_level_loose_acc": _parts(loose),
    }
    unknown = sum(held is None for own in strict for held in own)
    warnings = (f"{unknown} instructions left out: they need a language detector (pip install langdetect)",)
    return Result(tuple(samples), metrics, warnings if unknown else ())


def loose_forms(answer: str) -> list[str]:
    """The answer, and seven forms of it in which models wrap theirs less."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [form.replace("*", "") for form in cut]


def _check(row: Row, forms: Sequence[str], name: str, own: dict[str, object]) -> tuple[bool | None, bool | None]:
    try:
        held = follows(forms[0], name, own)
        if held is None:
            return None, None
        return held, any(follows(form, name, own) for form in forms)
    except DataError as error:
        raise DataError(f"row {identity(row)}: {error}") from error


def _whole(held: Sequence[bool | None]) -> bool | None:
    return None if None in held else all(held)


def _parts(held: Sequence[Sequence[bool | None]]) -> Metric:
    counts = [(sum(one is True for one in own), sum(one is not None for one in own)) for own in held]
    return Metric(np.array(counts, dtype=np.float64), ratio)


def _instructions(row: Row) -> tuple[list[str], list[dict[str, object]]]:
    names, settings = required(row, "instruction_id_list"), required(row, "kwargs")
    lists = isinstance(names, list) and isinstance(settings, list) and len(names) == len(settings) > 0
    if not lists or not all(isinstance(own, dict) for own in settings):
        raise DataError(f"row {identity(row)}: 'instruction_id_list' and 'kwargs' must be lists of the same length")
    # Parquet files hold every setting of every instruction, most of them null.
    return names, [{key: value for key, value in own.items() if value} for own in settings]
