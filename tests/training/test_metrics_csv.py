"""`metrics.csv` holds every step once, in order, whatever was logged and however often a run was killed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.training.metrics_csv import MetricsCSV, read_rows

NAMES = ["train/loss", "lr/decoder", "val/loss", "val/exact, match", 'tokens "per" second']


def test_validation_joins_the_row_of_its_step(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 2.0}, step=1)
    log.log_metrics({"train/loss": 1.0}, step=2)
    log.log_metrics({"val/loss": 3.0}, step=2)
    log.log_metrics({"train/loss": 0.5}, step=3)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss,val/loss\n1,2,\n2,1,3\n3,0.5,\n"


def test_row_is_readable_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "deep" / "metrics.csv")
    for step in range(1, 4):
        log.log_metrics({"loss": float(step)}, step=step)
        assert [row["step"] for row in read_rows(log.path)] == [str(n) for n in range(1, step + 1)]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (0.1, "0.1"),
        (1 / 3, "0.333333"),
        (2.0, "2"),
        (1e-7, "1e-07"),
        (123456789.0, "1.23457e+08"),
        (123456789, "123456789"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_six_digits_and_counts_have_all(tmp_path: Path, value: float, cell: str) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"value": value}, step=1)
    assert read_rows(log.path) == [{"step": "1", "value": cell}]


def test_half_written_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.1")
    assert [row["step"] for row in read_rows(path)] == ["1", "2"]
    log = MetricsCSV(path)
    log.resume_from(2)
    log.log_metrics({"loss": 0.125}, step=3)
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n3,0.125\n"


def test_header_that_was_cut_off_is_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,lo")
    log = MetricsCSV(path)
    log.resume_from(0)
    log.log_metrics({"loss": 0.5}, step=1)
    assert read_rows(path) == [{"step": "1", "loss": "0.5"}]


def test_resuming_before_the_first_row_keeps_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n5,0.5\n6,0.25\n")
    log = MetricsCSV(path)
    log.resume_from(4)
    assert read_rows(path) == []
    log.log_metrics({"loss": 0.75}, step=5)
    assert read_rows(path) == [{"step": "5", "loss": "0.75"}]


def test_resuming_without_a_file_makes_none(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.resume_from(3)
    assert list(tmp_path.iterdir()) == []


def test_step_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the step"):
        MetricsCSV(tmp_path / "metrics.csv").log_metrics({"loss": 1.0})


def test_other_ranks_leave_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    text = "step,loss\n1,0.5\n2,0.2"
    path.write_text(text)
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    log = MetricsCSV(path)
    log.resume_from(1)
    log.log_metrics({"loss": 0.25}, step=2)
    assert path.read_text() == text


# One session: the step of the checkpoint that it starts from, as a share of what was done, how many steps it makes,
# whether the kill leaves half a line, and what is logged at each step beside the first column.
session = st.tuples(
    st.floats(0, 1),
    st.integers(0, 6),
    st.booleans(),
    st.lists(st.sets(st.sampled_from(NAMES[1:])), min_size=6, max_size=6),
)


@given(st.lists(session, min_size=1, max_size=4))
def test_every_step_is_there_once_however_often_a_run_was_killed(sessions: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.csv"
        expected: dict[int, dict[str, str]] = {}
        for number, (share, steps, torn, extras) in enumerate(sessions):
            log = MetricsCSV(path)
            if number:
                start = int(share * len(expected))
                log.resume_from(start)
                expected = {step: row for step, row in expected.items() if step <= start}
            for extra in extras[:steps]:
                step = len(expected) + 1
                first = {NAMES[0]: number + step / 8}
                log.log_metrics(first, step=step)
                late = {name: float(step * 10 + place) for place, name in enumerate(sorted(extra))}
                if late:
                    log.log_metrics(late, step=step)
                expected[step] = {name: f"{value:.6g}" for name, value in {**first, **late}.items()}
            if torn and path.exists():
                with open(path, "ab") as file:
                    file.write(b"99,0.1")
        found = read_rows(path) if path.exists() else []
        assert [int(row["step"]) for row in found] == list(range(1, len(expected) + 1))
        filled = [{name: cell for name, cell in row.items() if cell and name != "step"} for row in found]
        assert filled == list(expected.values())
