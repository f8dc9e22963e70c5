"""Official file formats, from files of the same form with made-up content to scores."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mmfuse.cli import main
from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.datasets import BENCHMARKS, Question, read_questions
from mmfuse.eval.scorers import SCORERS, score_rows

PICTURE = b"not a real picture, but bytes that have to come back whole" * 2


def tsv(path: Path, *records: dict[str, Any]) -> None:
    columns = list(dict.fromkeys(key for record in records for key in record))
    lines = ["\t".join(columns)] + ["\t".join(str(record.get(key, "")) for key in columns) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")


def dump(path: Path, value: Any, *, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value), encoding="utf-8")


def scored(questions: list[Question], task: str, said: str, protocol: str | None = None) -> dict[str, float]:
    return score_rows(task, [{**question.row, "prediction": said} for question in questions], protocol).values


def test_tsv_with_rotations_that_share_an_image(tmp_path: Path) -> None:
    cell = base64.b64encode(PICTURE).decode()
    shared = {"question": "What?", "category": "x", "l2-category": "y"}
    tsv(
        tmp_path / "MMBench_DEV_EN.tsv",
        {"index": 1, "hint": "Look.", "A": "cat", "B": "dog", "answer": "A", "image": cell, **shared},
        {"index": 1_000_001, "A": "dog", "B": "cat", "answer": "B", "image": 1, **shared},
    )
    questions = list(read_questions(tmp_path, "mmbench_dev_en"))
    assert questions[0].text == "Look.\nWhat?\nA. cat\nB. dog"
    assert [question.media[0].read() for question in questions] == [PICTURE, PICTURE]
    values = scored(questions, "mmbench", "cat")
    assert (values["circular_accuracy"], values["circular_accuracy/y"]) == (1.0, 1.0)
    assert scored(questions, "mmbench", "A")["circular_accuracy"] == 0.0


def test_mistakes_in_tables_are_named(tmp_path: Path) -> None:
    base = {"index": 1, "question": "Q", "answer": "A", "A": "x", "B": "y"}
    tsv(tmp_path / "MMStar.tsv", {**base, "image": 7})
    with pytest.raises(DataError, match="takes the image of '7', which is not above it"):
        list(read_questions(tmp_path, "mmstar"))
    tsv(tmp_path / "MMStar.tsv", {**base, "image": "%" * 80})
    (question,) = read_questions(tmp_path, "mmstar")
    with pytest.raises(DataError, match="index 1: the image is no base64"):
        question.media[0].read()
    tsv(tmp_path / "MMStar.tsv", {"index": 1, "image": "%" * 80})
    with pytest.raises(DataError, match="a record has no 'question'"):
        list(read_questions(tmp_path, "mmstar"))


def test_mme_from_its_table(tmp_path: Path) -> None:
    cell = base64.b64encode(PICTURE).decode()
    base = {"category": "OCR", "image_path": "1.png", "question": "Is it?"}
    tsv(
        tmp_path / "MME.tsv",
        {"index": 0, "answer": "Yes", "image": cell, **base},
        {"index": 1, "answer": "No", "image": 0, **base},
    )
    assert scored(list(read_questions(tmp_path, "mme")), "mme", "Yes")["perception"] == 50.0


def test_pope_from_three_files(tmp_path: Path) -> None:
    for split in ("random", "popular"):
        record = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
        dump(tmp_path / "output" / f"coco_pope_{split}.json", [record], lines=True)
    questions = list(read_questions(tmp_path, "pope"))
    values = scored(questions, "pope", "Yes.")
    assert (values["f1/random"], values["f1/popular"], len(questions)) == (1.0, 1.0, 2)
    with pytest.raises(FileNotFoundError):
        questions[0].media[0].read()


def test_vqa_joins_questions_and_annotations(tmp_path: Path) -> None:
    answers = [{"answer": "yes", "answer_id": n} for n in range(10)]
    record = {"question_id": 5, "image_id": 42, "answers": answers, "answer_type": "yes/no"}
    dump(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [record]})
    with pytest.raises(FileNotFoundError, match=r"v2_OpenEnded_mscoco_val2014_questions\.json"):
        list(read_questions(tmp_path, "vqav2"))
    dump(
        tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [{"question_id": 5, "image_id": 42, "question": "Is it?"}]},
    )
    (question,) = read_questions(tmp_path, "vqav2")
    assert question.text == "Is it?"
    assert question.media[0].name.endswith("val2014/COCO_val2014_000000000042.jpg")
    assert scored([question], "vqav2", "yes")["accuracy/yes/no"] == 1.0


HALLUSION = {
    "category": "VD",
    "subcategory": "map",
    "set_id": "1",
    "figure_id": "0",
    "question_id": "1",
    "question": "Q",
    "gt_answer": "1",
    "filename": "a.png",
}
MUSIC = {
    "question_id": 1,
    "video_id": "v",
    "question_content": "Is the <Object> in?",
    "templ_values": '["violin"]',
    "anser": "yes",
    "type": '["Visual", "Location"]',
}
SCIENCE = {"question": "Q", "choices": ["x", "y"], "answer": 1, "hint": "h", "image": "image.png", "split": "test"}
TEXT = {"question_id": 1, "image_id": "i", "question": "Q", "answers": ["a"] * 10}
DOCUMENT = {"questionId": 1, "image": "d/1.png", "question": "Q", "answers": ["a"]}


@pytest.mark.parametrize(
    ("name", "file", "value", "said"),
    [
        ("textvqa", "TextVQA_0.5.1_val.json", {"data": [TEXT]}, "a"),
        ("docvqa", "val_v1.0.json", {"data": [DOCUMENT]}, "a"),
        ("chartqa", "test/test_human.json", [{"imgname": "1.png", "query": "Q", "label": "5"}], "5.1"),
        ("scienceqa", "problems.json", {"1": SCIENCE}, "B"),
        ("hallusionbench", "HallusionBench.json", [HALLUSION], "Yes"),
        ("music_avqa", "avqa-test.json", [MUSIC], "yes"),
    ],
)
def test_json_beside_folders(tmp_path: Path, name: str, file: str, value: Any, said: str) -> None:
    dump(tmp_path / file, value)
    questions = list(read_questions(tmp_path, name))
    assert next(iter(scored(questions, BENCHMARKS[name].task, said).values())) == 1.0
    assert questions[0].media
    if name == "music_avqa":
        assert questions[0].text == "Is the violin in?"
    if name == "scienceqa":
        assert questions[0].text == "Context: h\nQ\nA. x\nB. y"
        assert questions[0].media[0].name.endswith("images/test/1/image.png")


def test_ifeval(tmp_path: Path) -> None:
    record = {"key": 1000, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    dump(tmp_path / "ifeval_input_data.jsonl", [record], lines=True)
    assert scored(list(read_questions(tmp_path, "ifeval")), "ifeval", "fine")["prompt_level_strict_acc"] == 1.0


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = {"bytes": PICTURE, "path": "1.png"}
    rows = [
        {"id": "validation_Math_1", "question": "<image 1> What?", "options": "['a', 'b']", "answer": "B",
         "question_type": "multiple-choice", "image_1": image},
        {"id": "validation_Math_2", "question": "Which <image 1>?", "options": "[]", "answer": "7",
         "question_type": "open", "image_1": image},
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "validation-00000-of-00001.parquet")
    questions = list(read_questions(tmp_path, "mmmu"))
    assert [question.media[0].read() for question in questions] == [PICTURE, PICTURE]
    values = scored(questions, "mmmu", "(B)", "strict")
    assert (values["accuracy"], values["accuracy/Math"]) == (0.5, 0.5)
    vista = {"pid": "1", "question": "Q", "decoded_image": image, "answer": "7", "question_type": "free_form"}
    vista |= {"answer_type": "integer", "metadata": {"task": "geometry", "skills": ["algebra"]}}
    parquet.write_table(pyarrow.Table.from_pylist([vista]), tmp_path / "testmini-0.parquet")
    assert scored(list(read_questions(tmp_path, "mathvista")), "mathvista", "7")["accuracy/algebra"] == 1.0
    (tmp_path / "testmini-0.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="no Parquet file"):
        list(read_questions(tmp_path, "mathvista"))


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"pope: none of coco_pope_\*.json is below"):
        list(read_questions(tmp_path, "pope"))
    with pytest.raises(ConfigError, match="did you mean 'pope'"):
        list(read_questions(tmp_path, "popes"))
    dump(tmp_path / "x" / "coco_pope_random.json", [{}], lines=True)
    assert main(["tasks", "--check", "--data-root", str(tmp_path), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["pope"]["bytes"] == 2
    assert rows["mme"]["found"] == []
    assert rows["mme"]["source"]
    assert main(["tasks", "--check", "--data-root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "missing: MME.tsv  from" in text
    assert main(["tasks"]) == 0
    assert main(["tasks", "--check"]) == 2
    assert main(["tasks", "--check", "--data-root", str(tmp_path / "none")]) == 2


def test_every_benchmark_has_a_scorer() -> None:
    assert {benchmark.task for benchmark in BENCHMARKS.values()} <= set(SCORERS)


def test_ids_that_occur_twice_are_refused(tmp_path: Path) -> None:
    record = {"key": 1, "prompt": "P", "instruction_id_list": [], "kwargs": []}
    dump(tmp_path / "ifeval_input_data.jsonl", [record, record], lines=True)
    with pytest.raises(DataError, match="the id '1' occurs twice"):
        list(read_questions(tmp_path, "ifeval"))
