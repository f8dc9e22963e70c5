"""Remote shards are fetched once, whole, and never mixed up. Over HTTP from a server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmfuse.data import open_source
from mmfuse.data.remote import RemoteCache, RemoteSettings
from mmfuse.errors import ConfigError, DataError


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, notes what was read, and sends on what is in `moved`."""

    read: list[str]
    moved: dict[str, str]

    def do_GET(self) -> None:
        type(self).read.append(self.path)
        if not self.is_moved():
            super().do_GET()

    def do_HEAD(self) -> None:
        if not self.is_moved():
            super().do_HEAD()

    def is_moved(self) -> bool:
        target = type(self).moved.get(self.path)
        if target is not None:
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()
        return target is not None

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A URL, and the folder that lies behind it."""
    folder = tmp_path / "site"
    folder.mkdir()
    Quiet.read, Quiet.moved = [], {}
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()
        thread.join()


def write_shard(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = len(text.encode())
            out.addfile(info, io.BytesIO(text.encode()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remote"


def test_shards_of_one_name_from_two_sources_are_two(site: tuple[str, Path], cache: Path) -> None:
    url, folder = site
    for name in ("cc3m", "laion"):
        write_shard(folder / name / "00000.tar", f"of {name}")
        write_shard(folder / name / "00001.tar", f"second of {name}")
    for _ in range(2):
        for name in ("cc3m", "laion"):
            source = open_source(f"{url}/{name}/{{00000..00001}}.tar")
            assert [source[n].text for n in range(len(source))] == [f"of {name}", f"second of {name}"]
            assert source[0].key == "00000.tar:0"
    assert sorted(Quiet.read) == sorted(f"/{n}/0000{k}.tar" for n in ("cc3m", "laion") for k in range(2))


def test_file_that_was_replaced_is_fetched_again(site: tuple[str, Path], cache: Path) -> None:
    url, folder = site
    write_shard(folder / "a.tar", "old")
    assert open_source(f"{url}/a.tar")[0].text == "old"
    write_shard(folder / "a.tar", "new one", "and more")
    (folder / "a.tar").write_bytes((folder / "a.tar").read_bytes() + bytes(10240))
    assert len(open_source(f"{url}/a.tar")) == 2


@pytest.mark.parametrize(
    "url", ["pipe:touch {marker}; cat a.tar", "file:///a.tar", "ftp://host/a.tar", "gopher://a/b.tar"]
)
def test_other_schemes_are_refused_and_nothing_runs(url: str, tmp_path: Path) -> None:
    marker = tmp_path / "code_ran"
    with pytest.raises(DataError, match="is not allowed"):
        open_source(url.replace("{marker}", str(marker)))
    assert not marker.exists()


def test_missing_file_is_named(site: tuple[str, Path], cache: Path) -> None:
    with pytest.raises(DataError, match=r"/none\.tar: there is no such file"):
        open_source(f"{site[0]}/none.tar")


def test_incomplete_arrival_leaves_nothing(
    site: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = site
    write_shard(folder / "a.tar", "text")
    monkeypatch.setattr(RemoteCache, "_described", lambda self, url: (20480, "as it was a moment ago"))
    with pytest.raises(DataError, match="10240 bytes arrived, the file has 20480"):
        RemoteCache(tmp_path / "c").fetch([f"{url}/a.tar"])
    assert not [file for file in (tmp_path / "c").rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_cache_keeps_to_its_limit_and_drops_the_oldest(site: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = site
    for name in "abc":
        write_shard(folder / f"{name}.tar", name)
    held = RemoteCache(tmp_path / "c", RemoteSettings(cache_bytes=25_000))
    (first,) = held.fetch([f"{url}/a.tar"])
    second, third = held.fetch([f"{url}/b.tar", f"{url}/c.tar"])
    assert not first.exists() and second.exists() and third.exists()
    with pytest.raises(ConfigError, match="3 remote shards have 30,720 bytes, the cache may hold 25,000"):
        held.fetch([f"{url}/{name}.tar" for name in "abc"])


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("file:///etc/passwd", "refused to be sent on to file:///etc/passwd: file: is not allowed there"),
        ("ftp://127.0.0.1/a.tar", "ftp: is not allowed there"),
        ("{local}/b.tar", "'localhost' is in a private network; data.remote.hosts can allow it"),
        ("http://169.254.169.254/latest/b.tar", "'169.254.169.254' is in a private network"),
    ],
)
def test_redirects_lead_nowhere_else(target: str, says: str, site: tuple[str, Path], cache: Path) -> None:
    url, folder = site
    write_shard(folder / "b.tar", "another one")
    Quiet.moved["/a.tar"] = target.replace("{local}", url.replace("127.0.0.1", "localhost"))
    with pytest.raises(DataError, match="refused to be sent on") as raised:
        open_source(f"{url}/a.tar")
    assert says in str(raised.value) and "/b.tar" not in Quiet.read


def test_redirects_within_bounds_are_followed(site: tuple[str, Path], cache: Path) -> None:
    url, folder = site
    write_shard(folder / "b.tar", "moved")
    Quiet.moved["/a.tar"] = "/b.tar"
    assert open_source(f"{url}/a.tar")[0].text == "moved"
    Quiet.moved["/c.tar"] = f"{url.replace('127.0.0.1', 'localhost')}/b.tar"
    both = RemoteSettings(hosts=["127.0.0.1", "local*"])
    assert open_source(f"{url}/c.tar", remote=both)[0].text == "moved"


def test_hosts_that_are_not_named_are_refused(site: tuple[str, Path], cache: Path) -> None:
    url, folder = site
    write_shard(folder / "b.tar", "text")
    with pytest.raises(DataError, match=r"data may not come from '127\.0\.0\.1', see data\.remote\.hosts"):
        open_source(f"{url}/b.tar", remote=RemoteSettings(hosts=["*.example.org"]))
    Quiet.moved["/a.tar"] = f"{url.replace('127.0.0.1', 'localhost')}/b.tar"
    with pytest.raises(DataError, match=r"data\.remote\.hosts does not name 'localhost'"):
        open_source(f"{url}/a.tar", remote=RemoteSettings(hosts=["127.0.0.1"]))
    assert "/b.tar" not in Quiet.read


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ("https://a.org/x.tar", "http://a.org/x.tar", False),
        ("http://a.org/x.tar", "https://a.org/x.tar", True),
        ("https://a.org/x.tar", "https://10.1.2.3/x.tar", False),
        ("https://a.org/x.tar", "https://[::1]/x.tar", False),
        ("https://a.org/x.tar", "https://93.184.216.34/x.tar", True),
    ],
)
def test_rules_of_redirects(before: str, after: str, allowed: bool, tmp_path: Path) -> None:
    """By numbers, which need no name server."""
    check = RemoteCache(tmp_path)._check_redirect(before, after)
    with contextlib.nullcontext() if allowed else pytest.raises(DataError):
        asyncio.run(check)


def test_size_of_the_cache_is_a_setting(site: tuple[str, Path], cache: Path) -> None:
    write_shard(site[1] / "a.tar", "text")
    with pytest.raises(ConfigError, match=r"have 10,240 bytes, the cache may hold 5,000 \(data.remote.cache_bytes\)"):
        open_source(f"{site[0]}/a.tar", remote=RemoteSettings(cache_bytes=5000))
    with pytest.raises(ConfigError, match=r"remote\.cache_bytes must be at least 1, got 0"):
        RemoteSettings(cache_bytes=0)
