from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmfuse.data import handwriting_shards
from mmfuse.data.handwriting import SCAN_SIZE, SPLITS, load_scans, make_scenes
from mmfuse.data.handwriting_questions import FAMILIES, NUMBER_WORDS, Balancer, candidates
from mmfuse.data.handwriting_shards import (
    Handwriting,
    encode_png,
    read_manifest,
    samples,
    write_shards,
)
from mmfuse.data.handwriting_tokenizer import SPECIAL_TOKENS, build_tokenizer, corpus, load_tokenizer

TINY = Handwriting(align=12, instruct=20, turns=5, val=28, test=42, shift=0.5, gain=0.3, per_shard=16)
PARTS = ("align", "instruct", "val", "test")

grids = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(0, 9), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
    )
)


def solve(question: str, grid: list[list[int]]) -> str:
    """Answer a question by reading its English and looking at the labels, cell by cell."""
    cells = {(y, x): digit for y, row in enumerate(grid) for x, digit in enumerate(row)}

    def number(word: str) -> int:
        return NUMBER_WORDS.index(word)

    if question == "Read all digits.":
        return " ".join("".join(str(digit) for digit in row) for row in grid)
    if found := re.fullmatch(r"What is in row (\w+), column (\w+)\?", question):
        return str(cells[number(found[1]), number(found[2])])
    if found := re.fullmatch(r"What is (right of|above) (\d)\?", question):
        (place,) = [place for place, digit in cells.items() if digit == int(found[2])]
        step = (0, 1) if found[1] == "right of" else (-1, 0)
        return str(cells[place[0] + step[0], place[1] + step[1]])
    if found := re.fullmatch(r"How many times is (\d) written\?", question):
        return str(sum(digit == int(found[1]) for digit in cells.values()))
    if found := re.fullmatch(r"Is there a (\d)\?", question):
        return "yes" if int(found[1]) in cells.values() else "no"
    found = re.fullmatch(r"What is largest in (row|column) (\w+)\?", question)
    assert found, f"no rule for {question!r}"
    axis = 0 if found[1] == "row" else 1
    return str(max(digit for place, digit in cells.items() if place[axis] == number(found[2])))


def test_splits_share_no_scan_and_lose_none():
    scans = load_scans()
    assert tuple(scans) == SPLITS
    index = np.concatenate([part.index for part in scans.values()])
    assert sorted(index.tolist()) == list(range(1797))
    for part in scans.values():
        shares = np.bincount(part.labels, minlength=10) / len(part)
        assert part.pixels.shape == (len(part), SCAN_SIZE, SCAN_SIZE) and part.pixels.dtype == np.uint8
        assert part.pixels.max() == 255 and part.pixels.min() == 0
        assert abs(shares - 0.1).max() < 0.01
    again = load_scans()
    assert all((scans[split].index == again[split].index).all() for split in SPLITS)


def test_scans_are_the_source_scaled_to_bytes():
    from sklearn.datasets import load_digits

    table = load_digits()
    for part in load_scans().values():
        assert (part.labels == table.target[part.index]).all()
        assert (np.round(part.pixels / 255 * 16) == table.images[part.index]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_every_cell_shows_the_scan_that_it_names(rows: int, cols: int, seed: int):
    scans = load_scans()["val"]
    scenes = make_scenes(scans, 3, np.random.default_rng(seed), rows=rows, cols=cols)
    assert scenes.pixels.shape == (3, SCAN_SIZE * rows, SCAN_SIZE * cols) and scenes.pixels.dtype == np.uint8
    row_of = {identity: number for number, identity in enumerate(scans.index.tolist())}
    for scene, y, x in itertools.product(range(3), range(rows), range(cols)):
        row = row_of[int(scenes.scans[scene, y, x])]
        cell = scenes.pixels[scene, SCAN_SIZE * y : SCAN_SIZE * (y + 1), SCAN_SIZE * x : SCAN_SIZE * (x + 1)]
        assert (cell == scans.pixels[row]).all()
        assert scenes.digits[scene, y, x] == scans.labels[row]


def test_shift_and_gain_keep_ink_in_its_cell():
    scans = load_scans()["train"]
    plain = make_scenes(scans, 40, np.random.default_rng(3), rows=2, cols=3)
    moved = make_scenes(scans, 40, np.random.default_rng(3), rows=2, cols=3, shift=1.0, gain=0.5)
    assert (plain.scans == moved.scans).all()

    def cells(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(40, 2, 8, 3, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8).astype(int)

    for before, after in zip(cells(plain.pixels), cells(moved.pixels), strict=True):
        padded = np.pad(before, 1)
        views = [padded[1 + dy : 9 + dy, 1 + dx : 9 + dx] for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
        assert any(((view == 0) == (after == 0)).all() and (after <= view).all() for view in views)
        assert after.max() >= before.max() // 2 - 1


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"cols": 10}, {"shift": 1.5}, {"gain": -0.1}])
def test_scene_arguments_out_of_range_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=r"1\.\.9|0\.\.1"):
        make_scenes(load_scans()["val"], 1, np.random.default_rng(0), **wrong)


@settings(max_examples=150, deadline=None)
@given(grids, st.sampled_from(sorted(FAMILIES)))
def test_answers_equal_brute_force(grid: list[list[int]], family: str):
    asked = candidates(family, grid)
    assert len({text for text, _ in asked}) == len(asked)
    for text, answer in asked:
        assert solve(text, grid) == answer


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 12), st.integers(0, 1000))
def test_dialogues_ask_different_questions(grid: list[list[int]], turns: int, seed: int):
    questions = Balancer(np.random.default_rng(seed)).dialogue(grid, turns, tuple(FAMILIES))
    texts = [question.text for question in questions]
    possible = sum(len(candidates(family, grid)) for family in FAMILIES)
    assert len(set(texts)) == len(texts) == min(turns, possible)
    first = [question.family for question in questions][: sum(bool(candidates(name, grid)) for name in FAMILIES)]
    assert len(set(first)) == len(first)


def test_weights_change_what_is_trained_on_and_nothing_else():
    even = Handwriting(align=12, instruct=1500, turns=1, val=70, test=70)
    uneven = replace(even, weights={"above": 6.0, "count": 2.0})
    asked = Counter(sample["family"][0] for sample in samples(uneven, "instruct"))
    assert set(asked) == set(FAMILIES)
    # Some scenes allow no question of `above`, so that it stays under its weight.
    assert 1.4 < asked["above"] / asked["count"] < 3 and 1.5 < asked["count"] / asked["read"] < 2.7
    for part in ("align", "val", "test"):
        for left, right in zip(samples(even, part), samples(uneven, part), strict=True):
            assert all((left[name] == right[name]) for name in left if name != "images")
            assert (left["images"][0] == right["images"][0]).all()
    assert uneven.fingerprint() != even.fingerprint()


@pytest.mark.parametrize("part", PARTS)
def test_samples_come_from_their_split_and_answer_right(part: str):
    held = set(load_scans()[part if part in SPLITS else "train"].index.tolist())
    for sample in samples(TINY, part):
        (image,) = sample["images"]
        assert image.shape == (16, 16) and image.dtype == np.uint8
        assert {scan for row in sample["scans"] for scan in row} <= held
        if part == "align":
            assert sample["text"] == "<image>" + solve("Read all digits.", sample["digits"])
            continue
        messages = sample["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert [message["content"].startswith("<image>\n") for message in messages[::2]] == [
            turn == 0 for turn in range(len(messages) // 2)
        ]
        assert len(messages) == 2 * (TINY.turns if part == "instruct" else 1)
        assert sample["targets"] == [message["content"] for message in messages[1::2]]
        for message, target in zip(messages[::2], sample["targets"], strict=True):
            assert solve(message["content"].removeprefix("<image>\n"), sample["digits"]) == target
        assert set(sample["family"]) <= set(FAMILIES) and len(sample["family"]) == len(sample["targets"])


def test_the_committed_test_mixture_is_large_even_and_hard_to_guess():
    asked: dict[str, Counter[str]] = {}
    for sample in samples(Handwriting(), "test"):
        asked.setdefault(sample["family"][0], Counter())[sample["targets"][0]] += 1
    total = sum(answers.total() for answers in asked.values())
    assert total >= 2000 and set(asked) == set(FAMILIES)
    assert min(answers.total() for answers in asked.values()) >= 0.1 * total
    best_guess = {family: max(answers.values()) / answers.total() for family, answers in asked.items()}
    assert best_guess["exists"] <= 0.51
    assert best_guess["count"] <= 0.36
    assert all(best_guess[family] <= 0.16 for family in FAMILIES if family not in ("exists", "count"))
    overall = sum(best_guess[family] * answers.total() for family, answers in asked.items()) / total
    assert overall < 0.3


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_png_round_trips(height: int, width: int, seed: int):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    image = Image.open(io.BytesIO(encode_png(pixels)))
    assert image.mode == "L" and (np.asarray(image) == pixels).all()


def test_shards_have_the_same_bytes_wherever_they_are_written(tmp_path: Path):
    manifests = [write_shards(tmp_path / name / "shards", TINY) for name in ("a", "b")]
    assert manifests[0] == manifests[1]
    names = sorted(path.name for path in (tmp_path / "a/shards").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b/shards").iterdir())
    for name in names:
        assert (tmp_path / "a/shards" / name).read_bytes() == (tmp_path / "b/shards" / name).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["shards"]
    other = write_shards(tmp_path / "c", Handwriting(**{**TINY.arguments(), "families": TINY.families, "seed": 1}))
    assert all(
        mine["sha256"] != theirs["sha256"]
        for part in PARTS
        for mine, theirs in zip(manifests[0]["parts"][part]["shards"], other["parts"][part]["shards"], strict=True)
    )


def test_shards_hold_the_samples_and_the_manifest_describes_them(tmp_path: Path):
    manifest = write_shards(tmp_path / "shards", TINY)
    assert manifest["licence"] == "CC BY 4.0" and "10.24432/C50P49" in manifest["source"]
    for part in PARTS:
        expected = list(samples(TINY, part))
        read: list[tuple[str, dict, np.ndarray]] = []
        for shard in manifest["parts"][part]["shards"]:
            data = (tmp_path / "shards" / shard["name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"] and len(data) == shard["bytes"]
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                members = tar.getmembers()
                assert len(members) == 2 * shard["samples"]
                assert {(info.mtime, info.uid, info.gid, info.uname) for info in members} == {(0, 0, 0, "")}
                for png, text in zip(members[::2], members[1::2], strict=True):
                    key = text.name.removesuffix(".json")
                    assert png.name == f"{key}.0.png"
                    pixels = np.asarray(Image.open(io.BytesIO(tar.extractfile(png).read())))
                    read.append((key, json.loads(tar.extractfile(text).read()), pixels))
        assert [key for key, _, _ in read] == [sample["key"] for sample in expected]
        for (_, record, pixels), sample in zip(read, expected, strict=True):
            assert (pixels == sample["images"][0]).all()
            assert record == {name: value for name, value in sample.items() if name not in ("key", "images")}
        for family, facts in manifest["parts"][part]["families"].items():
            targets = [
                target
                for sample in expected
                for name, target in zip(sample["family"], sample["targets"], strict=True)
                if name == family
            ]
            assert facts["questions"] == len(targets)
            assert facts["majority_accuracy"] == round(targets.count(facts["majority_answer"]) / len(targets), 4)
            assert targets.count(facts["majority_answer"]) == max(Counter(targets).values())


def test_good_shards_are_kept_and_bad_ones_rewritten(tmp_path: Path):
    folder = tmp_path / "shards"
    manifest = write_shards(folder, TINY)
    shard = folder / manifest["parts"]["val"]["shards"][0]["name"]
    good, written = shard.read_bytes(), shard.stat().st_mtime_ns
    assert write_shards(folder, TINY) == manifest and shard.stat().st_mtime_ns == written

    shard.write_bytes(good[:-1] + b"x")
    assert read_manifest(folder, TINY) is None
    assert write_shards(folder, TINY) == manifest and shard.read_bytes() == good

    shard.unlink()
    assert write_shards(folder, TINY) == manifest and shard.read_bytes() == good

    (folder / "manifest.json").write_text("{")
    assert write_shards(folder, TINY) == manifest

    longer = Handwriting(**{**TINY.arguments(), "families": TINY.families, "val": 35})
    assert write_shards(folder, longer)["parts"]["val"]["samples"] == 35
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        write_shards(tmp_path, TINY)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(FileExistsError, match="is a file"):
        write_shards(tmp_path / "thesis.tex", TINY)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmfuse.data.handwriting_shards._tar", full)
    with pytest.raises(OSError, match="No space"):
        write_shards(tmp_path / "shards", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_slower_writer_leaves_the_shards_that_a_faster_one_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run may be reading them already, and refuses shards that change under it."""
    folder = tmp_path / "shards"
    write_all = handwriting_shards._write_all

    def overtaken(new: Path, spec: Handwriting):
        monkeypatch.setattr(handwriting_shards, "_write_all", write_all)
        write_shards(folder, spec)
        files.update({path.name: path.stat().st_ino for path in folder.iterdir()})
        return write_all(new, spec)

    files: dict[str, int] = {}
    monkeypatch.setattr(handwriting_shards, "_write_all", overtaken)
    assert write_shards(folder, TINY) == read_manifest(folder, TINY)
    assert files and files == {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert list(tmp_path.iterdir()) == [folder]


def test_wrong_arguments_say_what_was_meant():
    with pytest.raises(ValueError, match="did you mean 'position'"):
        Handwriting(families=("read", "positon"))
    with pytest.raises(ValueError, match="did you mean 'instruct'"):
        next(samples(TINY, "instuct"))
    with pytest.raises(ValueError, match="once"):
        Handwriting(families=("read", "read"))
    with pytest.raises(ValueError, match="two columns"):
        Handwriting(cols=1)
    with pytest.raises(ValueError, match="add another"):
        Handwriting(families=("right_of", "above"))
    with pytest.raises(ValueError, match="did you mean 'above'"):
        Handwriting(weights={"abve": 2.0})
    with pytest.raises(ValueError, match=r"above 0, got 0 for 'count'"):
        Handwriting(weights={"count": 0})
    with pytest.raises(ValueError, match="test must be at least 1"):
        Handwriting(test=0)


def test_fingerprint_names_the_arguments():
    assert TINY.fingerprint() == Handwriting(**{**TINY.arguments(), "families": TINY.families}).fingerprint()
    assert TINY.fingerprint() != Handwriting().fingerprint()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_the_shipped_tokenizer_is_what_the_function_trains(tmp_path: Path, tokenizer):
    from mmfuse.data.handwriting_tokenizer import TOKENIZER_FOLDER

    build_tokenizer().save_pretrained(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TOKENIZER_FOLDER / name).read_text())
    assert 300 <= len(tokenizer) <= 600


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(["  two  spaces\t\r\n", "¹²³ ٣ 🖐 7e\u0301", "<image>x <|end|> y"]))
def test_any_text_round_trips(text: str, tokenizer):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_words_and_special_tokens_are_single_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    for text in corpus():
        pieces = re.findall(r"\d|[^\w\s]| ?[^\W\d]+| ", text)
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False)) == [
            piece.replace(" ", "Ġ") for piece in pieces
        ]
    for digit in "0123456789":
        assert len(tokenizer.encode(digit, add_special_tokens=False)) == 1
        assert tokenizer.encode(f"3{digit}", add_special_tokens=False)[1] == tokenizer.get_vocab()[digit]
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token == "<|end|>"
