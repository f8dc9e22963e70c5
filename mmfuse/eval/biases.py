"""What the answers themselves give away: a liking for yes, for a letter, and where in an answer things are made up.

Pure functions over records: rows with `id`, `prediction`, `target`, `category` and `cluster`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfuse.eval.statistics import mean_interval
from mmfuse.eval.tasks.items import Request, Task
from mmfuse.eval.text import normalise

Row = Mapping[str, Any]
BINS = 5
_WORD = re.compile(r"\w+")


def of_answers(task: Task, records: Sequence[Row]) -> dict[str, Any]:
    """The biases that a task can show, by name: `yes`, `letters` or `position`. Samples with errors are left out."""
    rows = [row for row in records if "error" not in row]
    targets = {normalise(str(item.target)) for item in task.items}
    if not rows:
        return {}
    if targets <= {"yes", "no"}:
        return {"yes": yes_bias(rows)}
    if all(len(target) == 1 and target.isalpha() for target in targets):
        return {"letters": letter_bias(rows)}
    if task.request is Request.GENERATE and any(len(_words(target)) > 1 for target in targets):
        return {"position": hallucination_by_position(rows)}
    return {}


def yes_bias(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """For each category, and for all: how often the model says yes, how often yes is right, and the difference.

    The difference has a 95 % interval over clusters. Answers that begin with neither yes nor no count as no yes; their
    share is `other`.
    """
    found = {}
    for name in ("all", *dict.fromkeys(str(row["category"]) for row in rows if row["category"])):
        own = [row for row in rows if name in ("all", row["category"])]
        said = [_first(str(row["prediction"])) for row in own]
        right = [normalise(str(row["target"])) == "yes" for row in own]
        apart = np.array([float(word == "yes") - yes for word, yes in zip(said, right, strict=True)])
        interval = mean_interval(apart, [str(row["cluster"]) for row in own])
        found[name] = {
            "n": len(own),
            "said": said.count("yes") / len(own),
            "right": sum(right) / len(own),
            "bias": float(apart.mean()),
            "low": interval.low,
            "high": interval.high,
            "other": sum(word not in ("yes", "no") for word in said) / len(own),
        }
    return found


def letter_bias(rows: Sequence[Row]) -> dict[str, Any]:
    """For each letter how often it is chosen, how often it is right, and its recall; and the spread of the recalls.

    The standard deviation of recalls is 0 for a model that answers all positions equally well (Zheng et al.,
    arXiv 2309.03882, RStd); a model that always says A has the largest.
    """
    letters = sorted({str(row["target"]) for row in rows})
    said = [str(row["prediction"]).strip()[:1].upper() for row in rows]
    table = {}
    for letter in letters:
        mine = [word == letter for word, row in zip(said, rows, strict=True) if str(row["target"]) == letter]
        table[letter] = {"said": said.count(letter) / len(rows), "right": len(mine) / len(rows),
                         "recall": sum(mine) / len(mine)}  # fmt: skip
    spread = float(np.std([own["recall"] for own in table.values()]))
    return {
        "n": len(rows),
        "letters": table,
        "recall_std": spread,
        "other": sum(w not in letters for w in said) / len(rows),
    }


def hallucination_by_position(rows: Sequence[Row]) -> dict[str, Any]:
    """Where in answers stand mentions of things that are not there.

    A mention is a word that occurs in some target of the task; it is made up where its own target does not hold it, or
    holds it less often. With captions of closed vocabulary (digits, objects) that is what CHAIR counts.

    Returns:
        `bins`: for each fifth of an answer the mentions and how many are made up; `survival`: the share of answers
        without a made-up mention among their first n, for n = 1, 2, … while five answers or more are that long.
    """
    known = {word for row in rows for word in _words(str(row["target"]))}
    mentions, invented = [0] * BINS, [0] * BINS
    sound: list[list[bool]] = []
    for row in rows:
        left = Counter(_words(str(row["target"])))
        words = _words(str(row["prediction"]))
        held = []
        for place, word in enumerate(words):
            if word in known:
                there = left[word] > 0
                left[word] -= 1
                part = min(BINS - 1, place * BINS // len(words))
                mentions[part] += 1
                invented[part] += not there
                held.append(there)
        sound.append(held)
    survival = []
    for count in range(1, max(map(len, sound), default=0) + 1):
        long = [all(held[:count]) for held in sound if len(held) >= count]
        if len(long) < 5:
            break
        survival.append({"mentions": count, "answers": len(long), "sound": sum(long) / len(long)})
    bins = [{"mentions": m, "invented": i, "rate": i / m if m else math.nan}
            for m, i in zip(mentions, invented, strict=True)]  # fmt: skip
    return {"n": len(rows), "bins": bins, "survival": survival}


def _first(text: str) -> str:
    words = _words(text)
    return words[0] if words else ""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
