"""What is wrong with a data set, counted, with the first place of each kind of fault."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from mmfuse.data.samples import Sample
from mmfuse.data.sources import JSONSource, Source, open_source
from mmfuse.data.sources.json_files import records_with_lines, sample_of_record
from mmfuse.data.sources.undecoded import Undecoded
from mmfuse.errors import DataError
from mmfuse.models.chat import content_text
from mmfuse.models.media import MEDIA

#: Kinds of faults, and what they mean for training.
KINDS: Final = {
    "malformed record": "no conversation or text that can be read",
    "missing file": "a medium that is named and is not there",
    "unreadable medium": "a medium that cannot be decoded",
    "mismatched placeholders": "another number of placeholders than media",
    "no answer": "nothing that the model would be taught to say",
    "empty answer": "an answer without a word",
    "duplicate": "the same texts with the same media as an earlier sample",
    "too long": "more tokens than --max_tokens",
}


class Fault(NamedTuple):
    """The first fault of a kind, and how many there are."""

    where: str
    detail: str
    times: int


@dataclass
class Findings:
    """Result of `lint`.

    Attributes:
        samples: how many there are.
        faults: by kind, see `KINDS`.
        lengths: of the samples that can be read, in the unit of the measure that was given.
    """

    samples: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def add(self, kind: str, where: str, detail: str) -> None:
        """Count a fault, and keep the place of the first one of its kind."""
        first = self.faults.get(kind, Fault(where, detail, 0))
        self.faults[kind] = first._replace(times=first.times + 1)


def lint(
    path: str,
    images: str | None,
    measure: Callable[[Sample], int],
    *,
    max_length: int | None = None,
    decode: bool = False,
) -> Findings:
    """Look at every sample at `path`, whatever is wrong with others.

    Args:
        path: of the data, see `open_source`.
        images: folder that names of images in a JSON file start from.
        measure: length of a sample.
        max_length: longest sample that is no fault.
        decode: decode all media, which takes the time that training takes for it.

    Raises:
        FileNotFoundError: there are no data at `path`.
        DataError: data whose structure is damaged, so that samples cannot be told apart.
    """
    findings, seen = Findings(), dict[str, str]()
    for where, outcome in _samples(path, images):
        findings.samples += 1
        if isinstance(outcome, Exception):
            kind = "missing file" if isinstance(outcome, FileNotFoundError) else "malformed record"
            findings.add(kind, where, str(outcome))
            continue
        digest = _check_media(findings, outcome, where, decode=decode)
        _check_text(findings, outcome, where)
        digest = hashlib.sha256((digest + json.dumps([outcome.messages, outcome.text])).encode()).hexdigest()
        if digest in seen:
            findings.add("duplicate", where, f"is the same as {seen[digest]}")
        seen.setdefault(digest, where)
        length = measure(outcome)
        findings.lengths.append(length)
        if max_length is not None and length > max_length:
            findings.add("too long", where, f"{length}, more than {max_length}")
    return findings


def _samples(path: str, images: str | None) -> Iterator[tuple[str, Sample | Exception]]:
    place = Path(path).expanduser()
    if place.suffix in (".json", ".jsonl"):
        root = Path(images).expanduser() if images else place.parent
        for line, raw in records_with_lines(place):
            where = f"{place}, line {line}"
            try:
                yield where, sample_of_record(raw, where, root)
            except DataError as error:
                yield where, error
        return
    source = open_source(path, images=images)
    if isinstance(source, JSONSource):  # a folder with one such file
        yield from _samples(str(source.path), images)
        return
    yield from _read(source)


def _read(source: Source) -> Iterator[tuple[str, Sample | Exception]]:
    for number in range(len(source)):
        try:
            sample = source.read(number)
        except (DataError, OSError) as error:
            yield source.key(number), error
        else:
            yield sample.key, sample


def _check_media(findings: Findings, sample: Sample, where: str, *, decode: bool) -> str:
    """Return what stands for the media in the search for duplicates."""
    digest = hashlib.sha256()
    for items in sample.media.values():
        for item in items:
            assert isinstance(item, Undecoded)
            try:
                data = item.read()
                digest.update(hashlib.sha256(data).digest())
                if decode:
                    item.decode()
            except FileNotFoundError as error:
                findings.add("missing file", where, str(error))
            except (DataError, OSError) as error:
                findings.add("unreadable medium", where, str(error))
    return digest.hexdigest()


def _check_text(findings: Findings, sample: Sample, where: str) -> None:
    contents = [content_text(message["content"]) for message in sample.messages or ()]
    texts = contents if sample.messages is not None else [sample.text or ""]
    for name, items in sample.media.items():
        marks = sum(text.count(MEDIA[name].placeholder) for text in texts)
        if marks != len(items):
            detail = f"{marks} {MEDIA[name].placeholder} and {len(items)} {MEDIA[name].plural}"
            findings.add("mismatched placeholders", where, detail)
    if sample.messages is None:
        answers = [(sample.text or "").replace(MEDIA["image"].placeholder, "")]
    else:
        roles = [message["role"] for message in sample.messages]
        answers = [text for role, text in zip(roles, contents, strict=True) if role == "assistant"]
    if not answers:
        findings.add("no answer", where, "no message of the assistant")
    elif not all(answer.strip() for answer in answers):
        findings.add("empty answer", where, "an answer without a word")
