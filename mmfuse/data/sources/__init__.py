"""Sources of samples: tar shards, and JSON files with images beside them."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from braceexpand import braceexpand

from mmfuse.data.decoders import DEFAULT_BUDGET, Budget
from mmfuse.data.remote import RemoteCache, RemoteSettings, check_scheme
from mmfuse.data.samples import Sample
from mmfuse.data.sources.folder import FolderSource
from mmfuse.data.sources.json_files import JSONSource
from mmfuse.data.sources.parquet import ParquetSource
from mmfuse.data.sources.shards import ShardSource
from mmfuse.errors import DataError
from mmfuse.paths import cache_directory

__all__ = ["FolderSource", "JSONSource", "ParquetSource", "ShardSource", "Source", "expand_braces", "open_source"]

_JSON: Final = (".json", ".jsonl")
_MANIFEST: Final = "manifest.json"
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|pipe:")


class _ListedShard(NamedTuple):
    name: str
    size: int
    sha256: str


class Source(Protocol):
    """Samples by number.

    Attributes:
        name: names the source in messages.
    """

    name: str

    @property
    def parts(self) -> Sequence[int]:
        """Number of samples in each shard, or in each run of neighbours; reading within one is cheap."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return what names the sample in messages, without reading it."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Return the sample with this number."""
        ...

    def read(self, index: int) -> Sample:
        """Return the same sample with media that are still to be decoded, see `Undecoded`."""
        ...

    def fingerprint(self) -> str:
        """Return a hash that is another one when the data are; where they lie does not matter."""
        ...


def open_source(
    path: str | Path,
    *,
    images: str | Path | None = None,
    budget: Budget = DEFAULT_BUDGET,
    remote: RemoteSettings = RemoteSettings(),  # noqa: B008  (frozen)
) -> Source:
    """Open the data at `path` and check their structure.

    Args:
        path: a URL of `.tar` shards (http, https, s3, gs), which are fetched into a cache; or a `.tar` shard; a folder
            of them; a pattern such as `train-*.tar` or `train-{0000..0003}.tar`; a `.json` or `.jsonl` file of LLaVA
            conversations, chats or documents; a `.parquet` file with images inside; a folder that holds one such file,
            or several of parquet; or a folder of images with a text beside each. A folder
            that holds shards is read as shards, whatever else it holds.
        images: for JSON: the folder to which names of images are relative, if it is not the file's own.
        budget: how large a file may be, see `decode_file`.
        remote: for a URL: where it may lead, and how much the cache may hold.

    Raises:
        FileNotFoundError: naming what is missing: the file, one shard of a range, or one that the manifest lists.
        DataError: a URL, or data that cannot be used; see `ShardSource` and `JSONSource`.
    """
    given = os.path.expanduser(os.fspath(path))
    if _URL.match(given):
        return _open_remote(given, images, budget, remote)
    place = Path(given)
    if images is not None and not Path(images).expanduser().is_dir():
        raise FileNotFoundError(f"{images}: there is no such folder of images")
    if not place.exists() and (has_magic(given) or "{" in given):
        return _open_shards(place.name, _matches(given), images, budget, expand_braces(given))
    if not place.exists():
        raise FileNotFoundError(f"{given}: there is no such file or folder")
    if place.is_dir():
        shards = sorted(place.glob("*.tar"))
        if shards:
            _refuse_parts(place)
            return _open_shards(place.name, shards, images, budget, ["*.tar"])
        if parquet := sorted(place.rglob("*.parquet")):
            return ParquetSource(parquet, place.name, budget)
        if not any(path.suffix in _JSON for path in place.iterdir()) and any(place.rglob("*.txt")):
            return FolderSource(place, budget)
        place = _only_json(place)
    if place.suffix == ".tar":
        return _open_shards(place.name, [place], images, budget)
    if place.suffix == ".parquet":
        return ParquetSource([place], place.name, budget)
    if place.suffix not in _JSON:
        hint = "; compressed shards cannot be read at random, unpack them to .tar" if ".tar" in place.name else ""
        raise DataError(f"{place}: unknown kind of data; expected .tar, .json, .jsonl or .parquet{hint}")
    return JSONSource(place, None if images is None else Path(images).expanduser(), budget)


def expand_braces(pattern: str) -> list[str]:
    """Expand ranges `{0000..0003}`, which keep their leading zeros, and lists `{a,b}`, as webdataset does.

    Raises:
        DataError: braces that do not match.
    """
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise DataError(f"{pattern}: braces do not match") from error


def _matches(pattern: str) -> list[Path]:
    """The files that a pattern names; each member of a brace range must bring one."""
    paths: list[Path] = []
    for one in expand_braces(pattern):
        found = sorted(glob(one)) if has_magic(one) else [one] if os.path.exists(one) else []
        if not found:
            missing = "no file matches" if has_magic(one) else "there is no shard"
            raise FileNotFoundError(f"{pattern}: {missing} {one}")
        paths += map(Path, found)
    if len(set(paths)) != len(paths):
        raise DataError(f"{pattern}: names a shard twice")
    for path in paths:
        if path.suffix != ".tar":
            raise DataError(f"{pattern}: patterns name .tar shards, and {path} is none")
    return paths


def _open_remote(given: str, images: str | Path | None, budget: Budget, remote: RemoteSettings) -> ShardSource:
    """Fetch the shards that a URL with braces names, and open the copies."""
    check_scheme(given)
    urls = expand_braces(given)
    for url in urls:
        if not url.endswith(".tar"):
            raise DataError(f"{url}: URLs name .tar shards, with braces for several, such as train-{{0000..0003}}.tar")
    paths = RemoteCache(cache_directory() / "remote", remote).fetch(urls)
    return _open_shards(Path(given).name, paths, images, budget)


def _only_json(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if path.suffix in _JSON)
    if len(found) != 1:
        names = f"several: {', '.join(path.name for path in found)}" if found else "none of them"
        raise DataError(f"{folder}: expected .tar shards or one .json or .jsonl file in this folder, found {names}")
    return found[0]


def _refuse_parts(folder: Path) -> None:
    """A folder with training and test shards is no source: one would train on the test."""
    parts = _manifest(folder)
    if len(parts) > 1:
        choices = ", ".join(str(folder / f"{part}-*.tar") for part in parts)
        raise DataError(f"{folder} holds several parts of one data set; name one of them: {choices}")


def _open_shards(
    name: str, paths: Sequence[Path], images: str | Path | None, budget: Budget, patterns: Sequence[str] = ()
) -> ShardSource:
    """Open shards; those that `patterns` asked for and a manifest lists must be there."""
    if images is not None:
        raise DataError(f"{name}: shards hold their images; a folder of images is for JSON only")
    checksums: dict[Path, str] = {}
    for folder in sorted({path.parent for path in paths}):
        own = {path.name: path for path in paths if path.parent == folder}
        for shard in (shard for shards in _manifest(folder).values() for shard in shards):
            if shard.name not in own:
                if any(fnmatch.fnmatch(shard.name, os.path.basename(pattern)) for pattern in patterns):
                    raise FileNotFoundError(f"{folder / _MANIFEST} lists {shard.name}, and there is no such shard")
                continue
            path = own[shard.name]
            checksums[path], size = shard.sha256, path.stat().st_size
            if size != shard.size:
                raise DataError(f"{path} has {size} bytes, its manifest says {shard.size}")
    return ShardSource(paths, checksums, name, budget)


def _manifest(folder: Path) -> dict[str, list[_ListedShard]]:
    """Shards by part of the data set, as `handwriting_shards` lists them; nothing for a manifest of another kind."""
    path = folder / _MANIFEST
    try:
        parts = json.loads(path.read_bytes())["parts"]
        return {
            part: [_ListedShard(shard["name"], shard["bytes"], shard["sha256"]) for shard in listed["shards"]]
            for part, listed in parts.items()
        }
    except (FileNotFoundError, KeyError, TypeError, AttributeError):
        return {}
    except ValueError as error:
        raise DataError(f"{path}: unreadable JSON: {error}") from error
