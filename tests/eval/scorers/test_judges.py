"""Judged benchmarks: requests, answers, and whose name a number carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.cli import main
from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.scorers.judges import llava_scores, mm_vet_prompt, requests, vet_score, with_judgements

VET = {"id": "v1", "prediction": "a cat", "target": "dog<OR>puppy", "question": "What is it?", "capability": ["rec"]}


@pytest.mark.parametrize(
    ("judgement", "pair"),
    [
        ("8 9\nBecause", (8, 9)),
        ("8,9", (8, 9)),
        ("8, 9", None),
        ("8", None),
        ("8/10 9/10", None),
        ("", None),
        ("nan 3", None),
    ],
)
def test_first_line(judgement: str, pair: Any) -> None:
    assert llava_scores(judgement) == pair


@pytest.mark.parametrize(
    ("judgement", "score"),
    [("0.5", 0.5), ("1.0 is right", 1.0), ("1.5", None), ("good", None), ("", None), ("nan", None)],
)
def test_vet_score(judgement: str, score: float | None) -> None:
    assert vet_score(judgement) == score


@given(st.text())
def test_reading_judgements_is_total(judgement: str) -> None:
    assert llava_scores(judgement) is None or len(llava_scores(judgement) or ()) == 2
    assert vet_score(judgement) is None or 0 <= (vet_score(judgement) or 0) <= 1


def test_llava_bench_is_a_ratio_of_means_and_failures_count() -> None:
    said = [("conv", "10 5"), ("conv", "8 8"), ("detail", "no idea")]
    rows = [
        {"id": i, "prediction": "", "target": "", "category": kind, "judgement": words, "judge": "gpt-4-0314"}
        for i, (kind, words) in enumerate(said)
    ]
    values = score_rows("llava_bench", rows).values
    assert values["relative_score"] == pytest.approx(100 * (5 + 8 - 1) / (10 + 8 - 1))
    assert values["relative_score/conv"] == pytest.approx(100 * 13 / 18)
    assert values["unparsed_rate"] == pytest.approx(1 / 3)


def test_another_judge_never_gets_the_official_name() -> None:
    row = {**VET, "judgement": "0.7", "judge": "small-model"}
    with pytest.raises(ConfigError, match="judged by gpt-4-0613, but here by small-model"):
        score_rows("mm_vet", [row])
    values = score_rows("mm_vet", [row], "substitute").values
    assert "score" not in values
    assert values["score (judge small-model; not comparable)"] == 0.7
    assert score_rows("mm_vet", [{**row, "judge": "gpt-4-0613"}]).values["score/rec"] == 0.7


def test_requests_are_exact_and_only_for_rows_that_need_one() -> None:
    asked = requests([VET], mm_vet_prompt, {"prompt": "Examples"})
    assert asked[0]["prompt"] == "Examples\nWhat is it? | dog <OR> puppy | a cat | "
    changed = requests([{**VET, "prediction": "a dog"}], mm_vet_prompt, {"prompt": "Examples"})
    assert asked[0]["sha256"] != changed[0]["sha256"]


def answer(**fields: Any) -> dict[str, Any]:
    return {"id": "v1", "judge": "j", "judgement": "1", **fields}


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([answer(id="v2")], "judgement v2: there is no such row"),
        ([answer(), answer()], "judgement v1: a second one"),
        ([answer(sha256="0")], "judgement v1: made for something else"),
        ([{"id": "v1", "judgement": "1"}], "'judge' is missing"),
    ],
)
def test_answers_are_checked(answers: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        with_judgements([VET], answers, "judgement")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_export_and_import_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = write(tmp_path / "p.jsonl", VET)
    (tmp_path / "prompt.txt").write_text("Examples")
    command = ["score", predictions, "--task", "mm_vet"]
    exported = tmp_path / "requests.jsonl"
    assert main([*command, "--export-requests", str(exported)]) == 2
    assert "need the resource 'prompt'" in capsys.readouterr().err
    assert main([*command, "--export-requests", str(exported), "--resource", f"prompt={tmp_path / 'prompt.txt'}"]) == 0
    request = json.loads(exported.read_text())
    judgements = write(tmp_path / "j.jsonl", {**request, "judge": "gpt-4-0613", "judgement": "0.3"})
    capsys.readouterr()
    assert main([*command, "--judgements", judgements, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == 0.3


def test_llava_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": 1, "prediction": "B", "target": "A", "question": "Q", "category": "conv", "caption": ["c1", "c2"]}
    rule = {"llava_bench_conv": {"role": "Assistant", "prompt": "Judge."}}
    predictions, rules = write(tmp_path / "p.jsonl", row), write(tmp_path / "rule.json", rule)
    out = tmp_path / "r.jsonl"
    words = [
        "score",
        predictions,
        "--task",
        "llava_bench",
        "--export-requests",
        str(out),
        "--resource",
        f"rule={rules}",
    ]
    assert main(words) == 0
    assert json.loads(out.read_text())["prompt"] == (
        "[Context]\nc1\nc2\n\n[Question]\nQ\n\n[Assistant 1]\nA\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nB\n\n[End of Assistant 2]\n\n[System]\nJudge.\n\n"
    )
    assert main(["score", predictions, "--task", "pope", "--export-requests", str(out)]) == 2


def test_mathvista_asks_only_where_the_answer_is_not_bare(tmp_path: Path) -> None:
    base = {"target": "7", "question_type": "free_form", "answer_type": "integer", "question": "Q"}
    rows = [{"id": 1, "prediction": "7", **base}, {"id": 2, "prediction": "It is seven", **base}]
    (tmp_path / "prompt").write_text("Demo")
    out = tmp_path / "r.jsonl"
    predictions = write(tmp_path / "p.jsonl", *rows)
    words = ["score", predictions, "--task", "mathvista", "--export-requests", str(out)]
    assert main([*words, "--resource", f"prompt={tmp_path / 'prompt'}"]) == 0
    (request,) = map(json.loads, out.read_text().splitlines())
    assert request["prompt"] == "Demo\n\nQ\n\nIt is seven\n\nExtracted answer: "
    said = with_judgements(rows, [{"id": 2, "judge": "m", "judgement": "7"}], "extraction")
    result = score_rows("mathvista", said)
    assert (result.values["accuracy"], result.warnings) == (1.0, ("answers extracted by m",))


def test_judgements_that_are_not_read_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = {"category": "VD", "subcategory": "map", "set_id": 1, "figure_id": 1, "question_id": 1}
    predictions = write(tmp_path / "p.jsonl", {"id": 1, "prediction": "Yes", "target": "1", **place})
    judgements = write(tmp_path / "j.jsonl", {"id": 1, "judge": "gpt-4", "judgement": "incorrect"})
    command = ["score", predictions, "--task", "hallusionbench", "--json", "--judgements", judgements]
    assert main(command) == 2
    assert "protocol vlmevalkit reads no judgements" in capsys.readouterr().err
    assert main([*command, "--protocol", "official"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.0


def test_files_that_are_no_text_and_halves_of_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    assert main(["score", str(tmp_path / "b.jsonl"), "--task", "pope"]) == 2
    assert "no UTF-8 text" in capsys.readouterr().err
    half = write(tmp_path / "p.jsonl", {"id": 1, "prediction": "\ud83d", "target": "\ud83d"})
    samples = tmp_path / "s.jsonl"
    assert main(["score", half, "--task", "exact_match", "--samples", str(samples)]) == 0
    assert json.loads(samples.read_text(encoding="utf-8"))["parsed"] == "\ud83d"
