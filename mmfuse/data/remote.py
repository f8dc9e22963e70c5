"""Shards on other machines: fetched whole into a local cache, and read from there.

A file in the cache lies in a folder named by a hash of its full URL and its fingerprint (size, and what the server says
about its version), so that `cc3m/00000.tar` and `laion/00000.tar` never meet, and a file that was replaced is fetched
anew. No URL starts a process: `pipe:` and every scheme that is not in `SCHEMES` are refused. A server that sends the
reader on to another one is followed within bounds, see `RemoteSettings`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import fnmatch
import hashlib
import ipaddress
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import fsspec

from mmfuse.data.quarantine import retried
from mmfuse.errors import ConfigError, DataError

#: What a source may be fetched by, and the extra that brings it.
SCHEMES: Final = {"http": "remote", "https": "remote", "s3": "s3", "gs": "gs"}

_CHUNK: Final = 8 << 20
#: What file systems call the version of a file.
_VERSION: Final = ("ETag", "etag", "LastModified", "last_modified", "mtime", "generation", "md5Hash")


@dataclass(frozen=True)
class RemoteSettings:
    """What may be fetched from other machines.

    A redirect may change http to https and not back, and leads to no other scheme. To a host of a private network (this
    machine, `10.0.0.0/8`, a cloud's metadata, ...) it leads only if `hosts` names that host.

    Attributes:
        cache_bytes: that the cache may hold. Files that nothing asked for longest go first.
        hosts: of http and https that data may come from, redirects included, also as patterns such as `*.example.org`;
            any by default.
    """

    cache_bytes: int = 1 << 40
    hosts: list[str] | None = None

    def __post_init__(self) -> None:
        if self.cache_bytes < 1:
            raise ConfigError(f"remote.cache_bytes must be at least 1, got {self.cache_bytes}")

    def allows(self, host: str) -> bool:
        """Whether `hosts` names this host, or no host."""
        return self.hosts is None or any(fnmatch.fnmatchcase(host.lower(), one.lower()) for one in self.hosts)


class RemoteCache:
    """Files of other machines, in a folder of this one.

    Args:
        folder: of the cache; several processes may share it.
        settings: how large it may be, and where files may come from. Files of one `fetch` do not drive each other out.
    """

    def __init__(self, folder: Path, settings: RemoteSettings = RemoteSettings()) -> None:
        self.folder = folder
        self.settings = settings

    def fetch(self, urls: Sequence[str]) -> list[Path]:
        """Return local copies, in the order of `urls`; what the cache holds is not fetched again.

        Raises:
            DataError: a scheme or host that is not allowed, a file that is not there, or one that arrived incomplete.
            ConfigError: together they are larger than the cache may be.
            OSError: the network fails, after retries.
        """
        described = [(url, *self._described(url)) for url in urls]
        total, limit = sum(size for _, size, _ in described), self.settings.cache_bytes
        if total > limit:
            raise ConfigError(
                f"{len(urls)} remote shards have {total:,} bytes, the cache may hold {limit:,} "
                "(data.remote.cache_bytes)"
            )
        wanted = [self._place(url, version) for url, _, version in described]
        self.folder.mkdir(parents=True, exist_ok=True)
        for (url, size, _), path in zip(described, wanted, strict=True):
            with self._locked(path):
                if not path.exists():
                    self._make_room(size, keep=wanted)
                    path.parent.mkdir(exist_ok=True)
                    retried(partial(self._download, url, size, path), url)
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
            if used + size <= self.settings.cache_bytes:
                return
            if folder not in kept:
                shutil.rmtree(folder)
                used -= sizes[folder]

    def _described(self, url: str) -> tuple[int, str]:
        """Size in bytes, and a text that is another one when the file is."""
        system, path = self._file_system(url)
        try:
            info: dict[str, Any] = retried(lambda: system.info(path), url)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, DataError):  # fsspec makes one thing of all that can go wrong here
                raise error.__cause__ from None
            raise DataError(f"{url}: there is no such file") from error
        size = info.get("size")
        if size is None:
            raise DataError(f"{url}: the server does not say how large the file is")
        return int(size), json.dumps([int(size), *(str(info[name]) for name in _VERSION if name in info)])

    def _download(self, url: str, size: int, target: Path) -> None:
        system, path = self._file_system(url)
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

    def _file_system(self, url: str) -> tuple[Any, str]:
        scheme = check_scheme(url)
        options: dict[str, Any] = {}
        try:
            if scheme in ("http", "https"):
                host = urlsplit(url).hostname or ""
                if not self.settings.allows(host):
                    raise DataError(f"{url}: data may not come from {host!r}, see data.remote.hosts")
                options = {"client_kwargs": {"trace_configs": [self._guard()]}, "skip_instance_cache": True}
            system, path = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise DataError(f"{url}: pip install 'mmfuse[{SCHEMES[scheme]}]' brings {scheme} ({error})") from error
        return system, path

    def _guard(self) -> Any:
        """Looks at every redirect before it is followed."""
        import aiohttp

        async def check(session: Any, context: Any, redirect: Any) -> None:
            await self._check_redirect(str(redirect.response.url), redirect.response.headers.get("Location", ""))

        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(check)
        return trace

    async def _check_redirect(self, url: str, location: str) -> None:
        """Refuse a redirect that leads out of what is allowed.

        Raises:
            DataError: naming both ends.
        """
        target = urljoin(url, location)
        before, after = urlsplit(url), urlsplit(target)
        host = after.hostname or ""
        if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
            raise DataError(f"{url}: refused to be sent on to {target}: {after.scheme}: is not allowed there")
        if not self.settings.allows(host):
            raise DataError(f"{url}: refused to be sent on to {target}: data.remote.hosts does not name {host!r}")
        named = self.settings.hosts is not None
        if not named and host != before.hostname and await _is_private(host):
            raise DataError(
                f"{url}: refused to be sent on to {target}: {host!r} is in a private network; data.remote.hosts can "
                "allow it"
            )


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


async def _is_private(host: str) -> bool:
    """Whether a host has any address that is not one of the public internet."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:  # a name
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    return not all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found)
