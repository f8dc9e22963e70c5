"""Word and character error rates of transcripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.scorers.records import Counts, Metric, Result, Row, Sample, clusters, identity, mean, optional, text
from mmfuse.eval.text import edit_distance


def asr(rows: Sequence[Row], protocol: str, resources: Mapping[str, str]) -> Result:
    """Edits over the words of the references, of all rows together (not the mean over utterances); can exceed 1.

    `whisper` brings both sides into the form of Whisper's English normalizer (as transformers has it) and needs its
    spelling table `english.json` as the resource `spelling`. `whisper_no_spelling` leaves British spellings as they
    are. `whisper_basic` is its normalizer for other languages. `plain` lowers the case and takes words as they are.
    Where the references hold no word, the rate is 1 if there are edits and else 0, as in jiwer 4.
    """
    normal = _normaliser(protocol, resources)
    samples, counts = [], []
    for row in rows:
        said, meant = normal(text(row)), normal(text(row, "target"))
        words, letters = edit_distance(meant.split(), said.split()), edit_distance(meant.strip(), said.strip())
        sizes = len(meant.split()), len(meant.strip())
        counts.append((words, sizes[0], letters, sizes[1]))
        own = clusters(row, "speaker", "speaker_id")
        samples.append(
            Sample(identity(row), float(words == 0), said, protocol, own, optional(row, "split", "category"))
        )
    held = np.array(counts, dtype=np.float64)
    metrics = {"wer": Metric(held[:, :2], _rate), "cer": Metric(held[:, 2:4], _rate)}
    for name in dict.fromkeys(sample.category for sample in samples if sample.category):
        inside = np.array([[sample.category == name] for sample in samples])
        metrics[f"wer/{name}"] = Metric(held[:, :2] * inside, _rate)
    metrics["sentence_error_rate"] = mean(sample.score == 0 for sample in samples)
    return Result(tuple(samples), metrics)


def _rate(sums: Counts) -> Counts:
    edits, size = sums[..., 0], sums[..., 1]
    return np.divide(edits, size, out=np.array(edits > 0, dtype=np.float64), where=size > 0)


def _normaliser(protocol: str, resources: Mapping[str, str]) -> Callable[[str], str]:
    if protocol == "plain":
        return lambda transcript: " ".join(transcript.lower().split())
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if protocol == "whisper_basic":
        return BasicTextNormalizer()
    if protocol == "whisper_no_spelling":
        return EnglishTextNormalizer({})
    if "spelling" not in resources:
        raise ConfigError(
            "task asr, protocol whisper needs the resource 'spelling': whisper/normalizers/english.json of "
            "github.com/openai/whisper; without it use the protocol whisper_no_spelling"
        )
    try:
        return EnglishTextNormalizer(json.loads(resources["spelling"]))
    except json.JSONDecodeError as error:
        raise DataError(f"the resource 'spelling' is no JSON: {error}") from error
