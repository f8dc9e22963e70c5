"""Any source as webdataset shards: several processes, resumable, and bit by bit the same whoever writes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from webdataset import TarWriter

from mmfuse.data.decoders import PICTURES, picture_header
from mmfuse.data.samples import Sample
from mmfuse.data.sources import Source
from mmfuse.data.sources.undecoded import Undecoded
from mmfuse.errors import DataError

MANIFEST: Final = "manifest.json"
PROGRESS: Final = "packing.json"
FORMAT: Final = "mmfuse-shards-1"


@dataclass(frozen=True)
class Packed:
    """What became of the samples of one shard.

    Attributes:
        name, samples, size, sha256: of the shard; no size if it would have been empty.
        skipped: key and reason of samples that were left out.
    """

    name: str
    samples: int
    size: int
    sha256: str
    skipped: list[tuple[str, str]]


def pack_source(
    source: Source,
    folder: Path,
    *,
    per_shard: int = 1000,
    processes: int = 1,
    skip_bad: bool = False,
    report: Callable[[Packed], None] = lambda packed: None,
) -> list[Packed]:
    """Write the samples of `source` into `folder`, as `train-000000.tar` and so on, with a manifest.

    Shards appear whole or not at all. The same call goes on with what one that was cut off has left to do.

    Args:
        source: what is written; media keep their bytes.
        folder: where the shards go; made if it does not exist.
        per_shard: samples of a shard.
        processes: that write.
        skip_bad: leave out samples that cannot be read, and name them in the result; otherwise the first one ends it.
        report: called with every shard.

    Raises:
        DataError: a sample that cannot be read, or a folder that holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_for = {"format": FORMAT, "source": source.fingerprint(), "per_shard": per_shard, "skip_bad": skip_bad}
    _claim(folder, made_for)
    count = -(-len(source) // per_shard)
    jobs = [
        (range(at * per_shard, min((at + 1) * per_shard, len(source))), f"train-{at:06d}.tar") for at in range(count)
    ]
    results: list[Packed] = []

    def done(packed: Packed) -> None:
        results.append(packed)
        report(packed)

    if processes == 1:
        for numbers, name in jobs:
            done(_shard(source, numbers, folder / name, skip_bad))
    else:
        with ProcessPoolExecutor(processes) as pool:
            futures = [pool.submit(_shard, source, numbers, folder / name, skip_bad) for numbers, name in jobs]
            try:
                for future in as_completed(futures):
                    done(future.result())
            finally:
                pool.shutdown(cancel_futures=True)
    results.sort(key=lambda packed: packed.name)
    shards = [
        {"name": one.name, "samples": one.samples, "bytes": one.size, "sha256": one.sha256}
        for one in results
        if one.size
    ]
    if not shards:
        raise DataError(f"{source.name}: none of {len(source)} samples could be read")
    total = sum(one.samples for one in results)
    manifest = {**made_for, "parts": {"train": {"samples": total, "shards": shards}}}
    _write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return results


def _claim(folder: Path, made_for: Mapping[str, Any]) -> None:
    """Shards of another source, or of another size, must not be mixed with these."""
    path = folder / PROGRESS
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in made_for.items():
            if before.get(name) != value:
                raise DataError(f"{folder} holds shards made with another {name}: {before.get(name)}, not {value}")
    elif any(folder.iterdir()):
        raise DataError(f"{folder} is not empty, and holds no shards of `mmfuse data pack`; choose another folder")
    else:
        _write(path, json.dumps(made_for).encode())


def _shard(source: Source, numbers: range, path: Path, skip_bad: bool) -> Packed:
    notes = path.with_suffix(".skipped.json")
    if path.exists() or notes.exists():
        skipped = [tuple(one) for one in json.loads(notes.read_text(encoding="utf-8"))] if notes.exists() else []
        return _packed(path, len(numbers) - len(skipped), skipped)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    skipped, written = [], 0
    try:
        with scratch.open("wb") as file:
            # Fixed time and owner: the bytes depend on the samples alone.
            with TarWriter(file, mtime=0, user="", group="", encoder=False) as writer:
                for number in numbers:
                    try:
                        members = _members(source.read(number), f"{number:09d}")
                    except (DataError, OSError) as error:
                        if not skip_bad:
                            raise
                        skipped.append((source.key(number), str(error)))
                        continue
                    writer.write(members)
                    written += 1
            file.flush()
            os.fsync(file.fileno())
        if skipped:
            _write(notes, json.dumps(skipped, indent=1).encode())
        if written:
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return _packed(path, written, skipped)


def _packed(path: Path, samples: int, skipped: list[tuple[str, str]]) -> Packed:
    if not path.exists():
        return Packed(path.name, 0, 0, "", skipped)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return Packed(path.name, samples, path.stat().st_size, digest.hexdigest(), skipped)


def _members(sample: Sample, key: str) -> dict[str, Any]:
    """The members of a sample by their endings, media first; the record holds no names of files."""
    members: dict[str, Any] = {"__key__": key}
    for modality, items in sample.media.items():
        for number, item in enumerate(items):
            assert isinstance(item, Undecoded)
            data = item.read()
            if modality == "image" and not item.is_features:
                members[f"{number}.{picture_ending(data, item.where)}"] = data
            else:
                members[f"{modality}.{number}.{item.ending}"] = data
    record = dict(sample.info)
    if sample.messages is None:
        record["text"] = sample.text
    else:
        record["messages"] = [{**message, "content": _nameless(message["content"])} for message in sample.messages]
    members["json"] = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str).encode()
    return members


def _nameless(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {"type": part["type"]} for part in content]


def picture_ending(data: bytes, where: str) -> str:
    """The ending of the name of a picture's file, from its first bytes.

    Raises:
        DataError: no picture, or of a format that is not read.
    """
    names = {kind: ending for ending, kind in reversed(list(PICTURES.items()))}
    # Phones store a thumbnail or a depth map behind a JPEG.
    return names.get(str(picture_header(data, where).format), "jpg")


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_bytes(data)
    os.replace(scratch, path)
