"""Samples that cannot be used are named, counted and left out; too many end the run, and so does a failing disk."""

from __future__ import annotations

import errno
import io
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import SiglipImageProcessor

from mmfuse.data import BatchStream, Encoding, Plan, StagePlan, StreamLoader, StreamSettings, open_source
from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.data.quarantine import BadSampleLimit, Quarantine, TooManyBadSamplesError, read_quarantine, retried
from mmfuse.data.stream import ORIGIN
from mmfuse.errors import ConfigError, DataError, SourceError
from mmfuse.models import MultimodalProcessor

GOOD = 34


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


#: Six kinds of bad samples by key: members, and what the reason must say.
PLANTED: dict[str, tuple[dict[str, bytes], str]] = {
    "bad0": ({"jpg": b"\xff\xd8\xff\xe0 no image", "txt": b"<image>1"}, "cannot read this image"),
    "bad1": ({"jpg": jpeg(1)[:150], "txt": b"<image>1"}, "cannot read this image"),
    "bad2": ({"jpg": jpeg(2), "txt": b"\xff\xfe"}, "cannot read this .txt"),
    "bad3": ({"jpg": jpeg(3), "json": b'{"text": '}, "cannot read this .json"),
    "bad4": ({"txt": b"<image>1"}, "bad4"),
    "bad5": ({"jpg": jpeg(5), "json": b'{"messages": []}'}, "must be a list with at least one message"),
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "captions-0000.tar"
    samples = {f"good{n:02}": {"jpg": jpeg(n), "txt": b"<image>%d" % (n * 37)} for n in range(GOOD)}
    samples |= {key: members for key, (members, _) in PLANTED.items()}
    with tarfile.open(path, "w") as out:
        for key, members in samples.items():
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


Batches = Callable[..., StreamLoader]


@pytest.fixture
def batches(shard: Path, tmp_path: Path) -> Batches:
    pixels = SiglipImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True)
    processor = MultimodalProcessor(pixels, load_tokenizer(), visual_tokens=4)

    def make(limit: BadSampleLimit, steps: int = 20, workers: int = 0, **settings: Any) -> StreamLoader:
        source = open_source(shard)
        stream = StreamSettings(lanes=2, bad_samples=limit, **settings)
        plan = Plan(
            {"captions": source.parts},
            [StagePlan({"captions": 1.0}, steps)],
            window=stream.samples(4),
            seed=1,
            lanes=2,
            window_is_batch=stream.window_is_batch,
        )
        bad = Quarantine(tmp_path / "quarantine.jsonl", limit)
        encoding = Encoding({"captions": source}, processor, stream, 4, 1, bad)
        return StreamLoader(BatchStream(plan, encoding, workers=workers), workers=workers, timeout=60)

    return make


@pytest.mark.parametrize("settings", [{}, {"pack_to": 32, "window": 8}], ids=["plain", "packed"])
def test_six_kinds_of_bad_samples_are_named_and_counted(
    settings: dict[str, Any], batches: Batches, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()
    used: list[str] = []
    for batch in batches(BadSampleLimit(share=0.5), **settings):
        assert len(batch["keys"]) >= 4, "a bad sample leaves no hole in a batch"
        seen.update(batch[ORIGIN]["counts"])
        used += batch["keys"]
    assert not any("bad" in key for key in used) and seen["used/captions"] == len(used)
    entries = {entry["key"]: entry for entry in read_quarantine(tmp_path / "quarantine.jsonl")}
    assert set(entries) == {f"captions-0000.tar:{key}" for key in PLANTED}
    for key, (_, says) in PLANTED.items():
        entry = entries[f"captions-0000.tar:{key}"]
        assert entry["source"] == "captions" and says in entry["reason"], entry
    assert seen["bad/captions"] >= len(PLANTED)


def test_order_is_the_same_with_workers(batches: Batches) -> None:
    one, other = ([batch["keys"] for batch in batches(BadSampleLimit(0.5), workers=w)] for w in (0, 2))
    assert one == other and len(one) == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_limit_ends_the_run_with_counts(workers: int, batches: Batches) -> None:
    with pytest.raises(TooManyBadSamplesError, match=r"3 of the \d+ samples read from 'captions' cannot be used, more"):
        for _ in batches(BadSampleLimit(share=0.01, count=2), workers=workers):
            pass


def test_limits_hold_for_each_source_and_need_share_and_count() -> None:
    bad = Quarantine(None, BadSampleLimit(share=0.1, count=2))

    def broken() -> None:
        raise DataError("broken")

    for number in range(40):
        assert bad.attempt("a", str(number), lambda: 1) == 1
    for number in range(4):
        assert bad.attempt("a", f"bad{number}", broken) is None
    with pytest.raises(TooManyBadSamplesError, match="5 of the 45 samples read from 'a'"):
        bad.attempt("a", "bad4", broken)
    assert bad.attempt("b", "0", broken) is None and bad.attempt("b", "1", broken) is None


def test_source_without_a_good_sample_ends_the_run_whatever_the_share() -> None:
    bad = Quarantine(None, BadSampleLimit(share=1.0, count=3))
    with pytest.raises(TooManyBadSamplesError):
        for number in range(5):
            bad.attempt("a", str(number), _fail)


def _fail() -> None:
    raise DataError("broken")


def test_file_that_changed_is_no_bad_sample() -> None:
    def changed() -> None:
        raise SourceError("the shard has changed")

    with pytest.raises(SourceError):
        Quarantine(None).attempt("a", "0", changed)


@pytest.mark.parametrize(("share", "count"), [(-0.1, 0), (1.5, 0), (0.1, -1)])
def test_limits_out_of_range(share: float, count: int) -> None:
    with pytest.raises(ConfigError, match="bad samples"):
        BadSampleLimit(share, count)


def test_entry_is_written_once_and_a_cut_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    for _ in range(2):  # as a resumed run does
        bad = Quarantine(path)
        for _ in range(2):
            bad.add("a", "k", "broken")
    assert path.read_text().count("\n") == 2
    path.write_text(path.read_text() + '{"source": ')
    assert read_quarantine(path) == [{"source": "a", "key": "k", "reason": "broken"}]


def test_transient_failures_are_tried_again_and_then_end_the_run() -> None:
    waiting = [OSError(errno.EIO, "Input/output error")] * 2

    def flaky() -> int:
        if waiting:
            raise waiting.pop()
        return 7

    assert retried(flaky, "shard", wait=0) == 7
    waiting.extend([OSError(errno.EIO, "Input/output error")] * 9)
    with pytest.raises(OSError, match="shard: 3 attempts to read failed: Input/output error"):
        retried(flaky, "shard", tries=3, wait=0)
    assert len(waiting) == 6


def test_failures_that_do_not_pass_are_not_tried_again() -> None:
    calls = []

    def denied() -> None:
        calls.append(1)
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        retried(denied, "shard", wait=0)
    assert len(calls) == 1
