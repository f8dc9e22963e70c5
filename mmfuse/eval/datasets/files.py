"""Tables of questions in TSV files with base64 images, Parquet files, and JSON beside folders of media."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfuse.errors import DataError

#: One record of a file, as it stands there.
Record = dict[str, Any]
#: From a file to its records.
Reader = Callable[[Path], Iterator[Record]]


@dataclass(frozen=True)
class Medium:
    """A picture or clip of a question, not read yet.

    Attributes:
        name: names it in messages: its path, or the table and the record.
        read: gives the bytes of the file; may raise OSError or DataError.
    """

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: unique in the benchmark.
        text: what is asked, without a harness's own words around it.
        media: in reading order.
        row: what the scorer needs beside the prediction: `id`, `target` and the fields of the task.
    """

    id: str
    text: str
    media: tuple[Medium, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


def read_tsv(path: Path) -> Iterator[Record]:
    """The records of a TSV file with a header, as VLMEvalKit publishes them; empty cells are left out.

    Raises:
        DataError: a line with more cells than the header.
    """
    # An image is one cell: megabytes of base64.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8", newline="") as file:
        for number, record in enumerate(csv.DictReader(file, delimiter="\t"), 2):
            if None in record:
                raise DataError(f"{path}, record {number}: more cells than the header has")
            yield {key: value for key, value in record.items() if value not in (None, "")}


def read_jsonl(path: Path) -> Iterator[Record]:
    """The objects of a JSONL file, blank lines aside.

    Raises:
        DataError: a line is no JSON object.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(line, f"{path}, line {number}")


def read_json(path: Path, *keys: str) -> Iterator[Record]:
    """The objects of the list in a JSON file, or in one of its keys; an object of objects gives each with its `_key`.

    Raises:
        DataError: no JSON, or no list of objects there.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: no JSON: {error}") from error
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise DataError(f"{path}: there is no key {key!r}")
        value = value[key]
    items = [(None, item) for item in value] if isinstance(value, list) else list(dict(value).items())
    for name, item in items:
        if not isinstance(item, dict):
            raise DataError(f"{path}: expected objects, found {item!r:.80}")
        yield item if name is None else {"_key": name, **item}


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file, a batch at a time; nulls are left out.

    Raises:
        DataError: pyarrow is not installed, or the file is none.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: Parquet files need pyarrow (pip install mmfuse[eval])") from None
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    yield {key: value for key, value in record.items() if value is not None}
    except ArrowException as error:
        raise DataError(f"{path}: no Parquet file: {error}") from error


def _object(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object")
    return value


def need(record: Mapping[str, Any], key: str, path: Path) -> Any:
    """The value of a key that a record must have.

    Raises:
        DataError: it is missing.
    """
    if key not in record or (isinstance(record[key], float) and math.isnan(record[key])):
        raise DataError(f"{path}: a record has no {key!r}: {sorted(map(str, record))}")
    return record[key]


def file_medium(path: Path) -> Medium:
    """A medium in a file, which need not be there yet."""
    return Medium(str(path), path.read_bytes)


def base64_medium(text: str, name: str) -> Medium:
    """A medium in a cell of a table; the text is decoded when it is read."""

    def read() -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise DataError(f"{name}: the image is no base64: {error}") from error

    return Medium(name, read)


def parquet_medium(value: Any, name: str) -> Medium | None:
    """The medium in a struct `{bytes, path}` of a Parquet file; None if it holds no bytes.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, bytes):
        return Medium(name, io.BytesIO(value).getvalue)
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected a struct of bytes and path, got {value!r:.80}")
    held = value.get("bytes")
    return None if held is None else Medium(name, io.BytesIO(held).getvalue)
