"""Shards on other machines: fetched whole into a local cache, and read from there.

A file in the cache lies in a folder named by a hash of its full URL and its fingerprint (size, and what the server says
about its version), so that `cc3m/00000.tar` and `laion/00000.tar` never meet, and a file that was replaced is fetched
anew. No URL starts a process: `pipe:` and every scheme that is not in `SCHEMES` are refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import fsspec

from mmfuse.data.quarantine import retried
from mmfuse.errors import ConfigError, DataError

#: What a source may be fetched by, and the extra that brings it.
SCHEMES: Final = {"http": "remote", "https": "remote", "s3": "s3", "gs": "gs"}

_CHUNK: Final = 8 << 20
#: What file systems call the version of a file.
_VERSION: Final = ("ETag", "etag", "LastModified", "last_modified", "mtime", "generation", "md5Hash")


class RemoteCache:
    """Files of other machines, in a folder of this one.

    Args:
        folder: of the cache; several processes may share it.
        limit: bytes that the cache may hold. Files that nothing asked for longest go first; those of one `fetch` stay.
    """

    def __init__(self, folder: Path, limit: int = 1 << 40) -> None:
        self.folder = folder
        self.limit = limit

    def fetch(self, urls: Sequence[str]) -> list[Path]:
        """Return local copies, in the order of `urls`; what the cache holds is not fetched again.

        Raises:
            DataError: a scheme that is not allowed, a file that is not there, or one that arrived incomplete.
            ConfigError: together they are larger than the cache may be.
            OSError: the network fails, after retries.
        """
        described = [(url, *_described(url)) for url in urls]
        total = sum(size for _, size, _ in described)
        if total > self.limit:
            raise ConfigError(f"{len(urls)} remote shards have {total:,} bytes, the cache may hold {self.limit:,}")
        wanted = [self._place(url, version) for url, _, version in described]
        self.folder.mkdir(parents=True, exist_ok=True)
        for (url, size, _), path in zip(described, wanted, strict=True):
            with self._locked(path):
                if not path.exists():
                    self._make_room(size, keep=wanted)
                    path.parent.mkdir(exist_ok=True)
                    retried(lambda url=url, size=size, path=path: _download(url, size, path), url)  # type: ignore[misc]
                os.utime(path.parent)
        return wanted

    def _place(self, url: str, version: str) -> Path:
        name = Path(urlsplit(url).path).name
        return self.folder / hashlib.sha256(json.dumps([url, version]).encode()).hexdigest() / name

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """One process fetches a file, the others wait for it. The kernel frees the lock of a process that died."""
        with (self.folder / f"{path.parent.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, keep: Sequence[Path]) -> None:
        kept = {path.parent for path in keep}
        held = sorted((folder for folder in self.folder.iterdir() if folder.is_dir()), key=lambda f: f.stat().st_mtime)
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in held}
        used = sum(sizes.values())
        for folder in held:
            if used + size <= self.limit:
                return
            if folder not in kept:
                shutil.rmtree(folder)
                used -= sizes[folder]


def check_scheme(url: str) -> str:
    """Return the scheme of a URL.

    Raises:
        DataError: it is not one of `SCHEMES`.
    """
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        why = "it would run a command" if scheme == "pipe" else f"sources are local files, or {', '.join(SCHEMES)}"
        raise DataError(f"{url}: {scheme}: is not allowed: {why}")
    return scheme


def _file_system(url: str) -> tuple[Any, str]:
    scheme = check_scheme(url)
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url}: pip install 'mmfuse[{SCHEMES[scheme]}]' brings {scheme} ({error})") from error
    return system, path


def _described(url: str) -> tuple[int, str]:
    """Size in bytes, and a text that is another one when the file is."""
    system, path = _file_system(url)
    try:
        info: dict[str, Any] = retried(lambda: system.info(path), url)
    except FileNotFoundError as error:
        raise DataError(f"{url}: there is no such file") from error
    size = info.get("size")
    if size is None:
        raise DataError(f"{url}: the server does not say how large the file is")
    return int(size), json.dumps([int(size), *(str(info[name]) for name in _VERSION if name in info)])


def _download(url: str, size: int, target: Path) -> None:
    system, path = _file_system(url)
    part = target.with_name(f"{target.name}.part")
    try:
        with system.open(path, "rb") as source, part.open("wb") as out:
            shutil.copyfileobj(source, out, _CHUNK)
            out.flush()
            os.fsync(out.fileno())
        if (found := part.stat().st_size) != size:
            raise DataError(f"{url}: {found} bytes arrived, the file has {size}")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
