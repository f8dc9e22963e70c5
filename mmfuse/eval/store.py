"""The prediction store: every answer is on the disk before the next batch begins, and a killed run goes on from there.

A task has one part file for each rank, `predictions/TASK.part-RANK.jsonl`. After each batch its lines are appended with
one write and one fsync. When a task is done, the lines of all parts are written in the task's order into
`predictions/TASK.jsonl`, and the parts go. Nothing in these files depends on time, on the number of ranks or on how
often the run was killed, so they are the same bytes as those of a run that was not.

Each line has a `key`: the SHA-256 of all that the answer depends on. `predictions/TASK.manifest.json` holds the shared
part of it field by field, so that a mismatch can be named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.results import write_text_atomically

FOLDER: Final = "predictions"
#: How the line of every record begins.
_BEGIN: Final = b'{"id":'


class PredictionStore:
    """The answers to one task in an output folder.

    Args:
        out: the folder of the evaluation.
        task: the task's name.
        identity: what all answers depend on, by name: weights, prompts, generation settings, …
        rank: of this process; it writes a part file of its own.

    Raises:
        ConfigError: the folder holds answers that depend on something else, named field by field.
        DataError: a damaged line that no kill can have left.
    """

    def __init__(self, out: Path, task: str, identity: Mapping[str, str], rank: int = 0) -> None:
        self._folder = out / FOLDER
        self._task = task
        self._identity = dict(identity)
        self.final = self._folder / f"{task}.jsonl"
        self._manifest = self._folder / f"{task}.manifest.json"
        self._part = self._folder / f"{task}.part-{rank}.jsonl"
        self._check_identity()
        self.done = self._read()

    def claim(self) -> None:
        """Write down what the answers depend on; called by one rank, before any answer."""
        write_text_atomically(self._manifest, json.dumps(self._identity, indent=1, sort_keys=True) + "\n")

    @staticmethod
    def remove(out: Path, task: str) -> None:
        """Forget all answers to a task; called by one rank, before any store is opened."""
        folder = out / FOLDER
        for path in (folder / f"{task}.jsonl", folder / f"{task}.manifest.json", *folder.glob(f"{task}.part-*.jsonl")):
            path.unlink(missing_ok=True)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add answers; they are on the disk when this returns."""
        if not records:
            return
        text = "".join(_line(record) for record in records)
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._part.open("ab") as file:
            # A kill may have torn the last line; what follows must not be glued to it.
            if file.tell() and not _ends_line(self._part):
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        for record in records:
            self.done.setdefault(record["id"], dict(record))

    def finish(self, ids: Iterable[str]) -> list[dict[str, Any]]:
        """Write the final file from all parts and remove them; called by one rank when all are done.

        Args:
            ids: of all items, in the task's order.

        Raises:
            DataError: an item without an answer.
        """
        self.done = self._read()
        ordered = []
        for name in ids:
            if name not in self.done:
                raise DataError(f"task {self._task}: no answer to {name!r} in {self._folder}")
            ordered.append(self.done[name])
        write_text_atomically(self.final, "".join(map(_line, ordered)))
        # Beside the parts, what a kill in the middle of an atomic write has left.
        for path in (*self._parts(), *self._folder.glob(f".{self._task}.*.tmp")):
            path.unlink(missing_ok=True)
        return ordered

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._task}.part-*.jsonl"))

    def _check_identity(self) -> None:
        if not self._manifest.exists():
            if self.final.exists() or self._parts():
                raise ConfigError(f"{self._folder} holds answers to {self._task} without {self._manifest.name}; "
                                  "--fresh discards them")  # fmt: skip
            return
        found = json.loads(self._manifest.read_text(encoding="utf-8"))
        names = sorted(name for name in {*found, *self._identity} if found.get(name) != self._identity.get(name))
        if names:
            changes = ", ".join(f"{name} ({_short(found.get(name))} → {_short(self._identity.get(name))})"
                                for name in names)  # fmt: skip
            raise ConfigError(
                f"{self._folder} holds answers to {self._task} that were made otherwise; changed: {changes}. Use "
                "another --out, or --fresh to discard them"
            )

    def _read(self) -> dict[str, dict[str, Any]]:
        """All whole lines of all files; of answers to one item the first."""
        found: dict[str, dict[str, Any]] = {}
        for path in (self.final, *self._parts()):
            if path.exists():
                for record in read_records(path):
                    found.setdefault(record["id"], record)
        return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file in order; lines that a kill has torn are left out.

    Raises:
        DataError: a line that was not torn and is no record, with its number.
    """
    records = []
    lines = path.read_bytes().split(b"\n")
    torn = len(lines) - 1  # behind the last newline stands nothing, or what a kill has torn
    for number, line in enumerate(lines):
        if not line or number == torn:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            # A torn line that a later run went on behind begins as a record does.
            if line.startswith(_BEGIN[: len(line)]):
                continue
            raise DataError(f"{path}, line {number + 1}: unreadable JSON: {error}") from error
        if not isinstance(record, dict) or "id" not in record:
            raise DataError(f"{path}, line {number + 1}: expected an object with an id")
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) <= 16 else f"{value[:12]}…"
