"""`mmfuse data pack | lint | stats | peek`, and the sources that they brought: parquet and folders of pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfuse.cli import main
from mmfuse.data import Sample, open_source
from mmfuse.data.tools.pack import pack_source
from mmfuse.data.tools.stats import statistics, text_histogram
from mmfuse.errors import DataError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mmfuse(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["data", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def jpg(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 16), (number * 20, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def llava(number: int, **changes: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]
    return {"id": str(number), "image": f"{number}.jpg", "conversations": talk, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(jpg(number))
    (tmp_path / "chats.json").write_text(json.dumps([llava(number) for number in range(7)], indent=1))
    return tmp_path


def plain(sample: Sample) -> tuple[Any, ...]:
    texts = sample.messages if sample.messages is not None else sample.text
    return texts, dict(sample.info), [np.asarray(image).tolist() for image in sample.images]


def files(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_what_the_source_holds_whoever_writes_them(folder: Path, tmp_path: Path, mmfuse: Run) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    code, out, _ = mmfuse("pack", folder / "chats.json", "--out", one, "--per_shard", 3, "--processes", 1)
    assert code == 0 and out.startswith("7 samples in 3 shards")
    assert mmfuse("pack", folder / "chats.json", "--out", two, "--per_shard", 3, "--processes", 2)[0] == 0
    assert files(one) == files(two)
    source, packed = open_source(folder / "chats.json"), open_source(one)
    assert [plain(packed[at]) for at in range(7)] == [plain(source[at]) for at in range(7)]
    assert files(one).keys() == {
        "manifest.json",
        "packing.json",
        *(f"train-00000{number}.tar" for number in range(3)),
    }
    again = tmp_path / "again"
    pack_source(packed, again, per_shard=7)
    assert [plain(one) for one in map(open_source(again).__getitem__, range(7))] == [
        plain(source[at]) for at in range(7)
    ]


def test_packing_goes_on_where_it_was_cut_off(folder: Path, tmp_path: Path, mmfuse: Run) -> None:
    words = ["pack", folder / "chats.json", "--per_shard", 2, "--processes", 1, "--out"]
    assert mmfuse(*words, tmp_path / "whole")[0] == 0
    assert mmfuse(*words, tmp_path / "cut")[0] == 0
    cut = tmp_path / "cut"
    for name in ("manifest.json", "train-000001.tar", "train-000003.tar"):
        (cut / name).unlink()
    (cut / ".train-000001.tar.99.tmp").write_bytes(b"half")
    kept = (cut / "train-000000.tar").stat().st_mtime_ns
    assert mmfuse(*words, cut)[0] == 0
    assert (cut / "train-000000.tar").stat().st_mtime_ns == kept
    (cut / ".train-000001.tar.99.tmp").unlink()
    assert files(cut) == files(tmp_path / "whole")
    code, _, err = mmfuse("pack", folder / "chats.json", "--per_shard", 3, "--out", cut)
    assert code == 2 and "holds shards made with another per_shard: 2, not 3" in err
    code, _, err = mmfuse("pack", folder / "chats.json", "--out", folder)
    assert code == 2 and "is not empty, and holds no shards of `mmfuse data pack`" in err


def test_bad_samples_end_it_or_are_named(folder: Path, tmp_path: Path, mmfuse: Run) -> None:
    (folder / "3.jpg").unlink()
    (folder / "5.jpg").write_bytes(b"no picture")
    words = ["pack", folder / "chats.json", "--per_shard", 4, "--processes", 1, "--out"]
    code, _, err = mmfuse(*words, tmp_path / "strict")
    assert code == 2 and "chats.json[3]: there is no image" in err
    assert not list((tmp_path / "strict").glob("*.tar*")), "no shard in part"
    code, out, err = mmfuse(*words, tmp_path / "lax", "--skip_bad")
    assert code == 0 and out.startswith("5 samples in 2 shards") and "2 samples were skipped" in out
    assert "skipped chats.json[5]" in err
    assert len(open_source(tmp_path / "lax")) == 5
    assert mmfuse(*words, tmp_path / "lax", "--skip_bad")[1] == out, "the second time, too"


def test_lint_names_the_first_line_of_every_fault(folder: Path, mmfuse: Run) -> None:
    records = [
        llava(0),
        llava(1),
        llava(2, image="gone.jpg"),
        llava(3, image="gone too.jpg"),
        llava(4, conversations=[{"from": "human", "value": "no mark"}, {"from": "gpt", "value": "4"}]),
        llava(5, conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " \n"}]),
        llava(0, id="again"),
        {"id": "none"},
        llava(6, conversations=[{"from": "human", "value": "<image>" + "x" * 100}, {"from": "gpt", "value": "6"}]),
        llava(6, conversations=[{"from": "human", "value": "<image>only asked"}]),
        llava(1, image="broken.jpg"),
    ]
    (folder / "broken.jpg").write_bytes(b"no picture")
    path = folder / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    code, out, _ = mmfuse("lint", path, "--max_tokens", 90, "--decode")
    assert code == 1
    table = " ".join(out.split())
    for fault in (
        f"malformed record 1 {path}, line 8",
        f"missing file 2 {path}, line 3",
        f"unreadable medium 1 {path}, line 11",
        f"mismatched placeholders 1 {path}, line 5: 0 <image> and 1 images",
        f"no answer 1 {path}, line 10",
        f"empty answer 1 {path}, line 6",
        f"duplicate 1 {path}, line 7",
        f"too long 1 {path}, line 9: 108, more than 90",
    ):
        assert fault.replace(" ", "") in table.replace(" ", ""), fault
    assert "lengths (characters)" in out and "█" in out
    code, out, _ = mmfuse("lint", folder / "chats.json")
    assert code == 0 and "7 samples, no faults" in out


def test_lint_counts_tokens_with_media(folder: Path, mmfuse: Run) -> None:
    tokenizer = Path("mmfuse/data/tokenizer")
    root = Path(__file__).parents[2] / tokenizer
    words = ["lint", folder / "chats.json", "--tokenizer", root, "--image_tokens", 100]
    assert mmfuse(*words, "--max_tokens", 150)[0] == 0
    code, out, _ = mmfuse(*words, "--max_tokens", 100)
    assert code == 1 and "more than 100" in " ".join(out.split()) and "lengths (tokens)" in out


def test_lint_reads_shards(folder: Path, tmp_path: Path, mmfuse: Run) -> None:
    assert mmfuse("pack", folder / "chats.json", "--out", tmp_path / "shards", "--processes", 1)[0] == 0
    assert mmfuse("lint", tmp_path / "shards", "--decode")[0] == 0


def test_stats_are_counted_and_drawn(folder: Path, tmp_path: Path, mmfuse: Run) -> None:
    picture = tmp_path / "stats.png"
    code, out, _ = mmfuse("stats", folder / "chats.json", "--out", picture)
    assert code == 0 and "7 text + image" in out
    with Image.open(picture) as image:
        assert image.width > 600 and len(image.convert("L").getcolors(1 << 16) or []) > 10
    found = statistics(open_source(folder / "chats.json"), lambda sample: 5, "tokens")
    assert found.columns["image width (px)"] == [20 + number for number in range(7)]
    summary = found.summary()["image width (px)"]
    assert (summary["count"], summary["median"], summary["max"]) == (7, 23, 26)
    some = statistics(open_source(folder / "chats.json"), lambda sample: 5, "tokens", limit=3)
    assert some.columns["image width (px)"] == [20, 23, 26]


def test_histograms_count_everything() -> None:
    lines = text_histogram([1, 1, 2, 50])
    assert sum(int(line.split("–")[1].split()[1]) for line in lines) == 4
    assert text_histogram([]) == []


def test_peek_shows_samples(folder: Path, mmfuse: Run) -> None:
    code, out, _ = mmfuse("peek", folder / "chats.json", "--first", 2, "--count", 1)
    assert code == 0
    assert out.splitlines()[:4] == [
        "[2] chats.json[2]",
        "  image: 22 x 16, RGB",
        "  user: <image>",
        "What is 2?",
    ]
    code, _, err = mmfuse("peek", folder / "chats.json", "--first", 7)
    assert code == 2 and "chats.json has the samples 0 to 6" in err
    code, _, err = mmfuse("pek")
    assert code == 2 and "did you mean 'peek'?" in err


# Sources


def test_a_folder_of_pictures_with_texts(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    for name, text in (("a", "a cat"), ("cats/b", "two <image> cats")):
        (tmp_path / f"{name}.jpg").write_bytes(jpg(1))
        (tmp_path / f"{name}.txt").write_text(text + "\n")
    source = open_source(tmp_path)
    assert [source[at].text for at in range(2)] == ["<image>a cat", "two <image> cats"]
    assert [source[at].key for at in range(2)] == ["a.jpg", "cats/b.jpg"]
    assert source[0].images[0].size == (21, 16) and len(source) == 2 == sum(source.parts)
    before = source.fingerprint()
    (tmp_path / "a.txt").write_text("a dog, now")
    assert open_source(tmp_path).fingerprint() != before
    (tmp_path / "cats" / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.jpg: expected a \.txt or a \.json of the same name beside it, found none"):
        open_source(tmp_path)


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=group)
    return path


def test_parquet_with_images_inside(tmp_path: Path, mmfuse: Run) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"{number}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": str(number)}]},
            ],
            "images": [{"bytes": jpg(number), "path": None}],
            "source": "test",
        }
        for number in range(5)
    ]
    source = open_source(parquet(tmp_path / "chats.parquet", rows))
    assert len(source) == 5 and source.parts == [2, 2, 1]
    for number in (4, 0, 3):
        sample = source[number]
        assert sample.key == f"chats.parquet[{number}]" and sample.images[0].size == (20 + number, 16)
        assert sample.messages is not None and sample.messages[1]["content"] == [{"type": "text", "text": str(number)}]
        assert sample.info == {"source": "test"}
    assert mmfuse("pack", tmp_path / "chats.parquet", "--out", tmp_path / "shards", "--processes", 1)[0] == 0
    assert open_source(tmp_path / "shards")[3].images[0].size == (23, 16)


def test_parquet_of_question_and_answer_pairs(tmp_path: Path) -> None:
    texts = [{"user": "How many?", "assistant": "2", "source": "x"}, {"user": "Sure?", "assistant": "Yes"}]
    rows = [{"texts": texts, "images": [{"bytes": jpg(1), "path": "1.jpg"}] * 2}]
    sample = open_source(parquet(tmp_path / "a.parquet", rows))[0]
    assert sample.messages == (
        {"role": "user", "content": "<image><image>How many?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    )


def test_parquet_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: no readable parquet file"):
        open_source(tmp_path / "a.parquet")
    source = open_source(parquet(tmp_path / "b.parquet", [{"text": "<image>x", "image": {"path": "1.jpg"}}]))
    with pytest.raises(DataError, match=r"b\.parquet\[0\], image 0: expected a struct with the bytes of a file"):
        source[0]
