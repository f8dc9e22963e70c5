from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfuse.eval import provenance, write_results
from mmfuse.eval.results import git_state, write_text_atomically


def test_results_are_flat_json_with_families(tmp_path):
    path = write_results(
        tmp_path / "run" / "results.json",
        exact_match=np.float64(0.5),
        n=torch.tensor(4),
        blind_exact_match=None,
        interval=(0.1, 0.9),
        fusion="mma – ✓",
        by_family={"read": {"n": 4, "interval": [0.1, 0.9], "blind_exact_match": None}},
    )
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "exact_match": 0.5,
        "n": 4,
        "blind_exact_match": None,
        "interval": [0.1, 0.9],
        "fusion": "mma – ✓",
        "by_family": {"read": {"n": 4, "interval": [0.1, 0.9], "blind_exact_match": None}},
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = write_results(tmp_path / "results.json", loss=float("nan"), best=float("inf"), all=[1.0, float("-inf")])
    assert json.loads(path.read_text()) == {"loss": None, "best": None, "all": [1.0, None]}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"config": {"a": 1}}, "config is a dict"),
        ({"folder": Path("x")}, "folder is a PosixPath"),
        ({"by_family": {"read": {"n": object()}}}, r"by_family\.read\.n is a object"),
        ({"scores": [{1}]}, "scores is a set"),
    ],
)
def test_other_values_are_refused_by_name_and_leave_the_old_file(tmp_path, results, message):
    path = write_results(tmp_path / "results.json", n=1)
    with pytest.raises(TypeError, match=message):
        write_results(path, **results)
    assert json.loads(path.read_text()) == {"n": 1}


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = write_results(tmp_path / "results.json", n=1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_results(path, n=2)
    assert json.loads(path.read_text()) == {"n": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_the_file_has_the_mode_that_the_umask_gives(tmp_path):
    path = write_text_atomically(tmp_path / "a.txt", "x")
    other = tmp_path / "b.txt"
    other.write_text("x")
    assert path.stat().st_mode == other.stat().st_mode


def test_provenance_can_be_written_and_names_nobody(tmp_path):
    found = provenance()
    text = write_results(tmp_path / "results.json", **found).read_text()
    assert found["torch_version"] == torch.__version__
    assert found["torch_threads"] == torch.get_num_threads()
    assert {"mmfuse_version", "transformers_version", "lightning_version", "python_version", "platform"} <= set(found)
    private = [str(Path.home()), str(Path.cwd()), os.uname().nodename]
    assert not [word for word in private if len(word) > 3 and word in text]


def test_packages_that_are_not_installed_have_no_version(monkeypatch):
    monkeypatch.setattr("mmfuse.eval.results._PACKAGES", ("transformers", "no_such_package"))
    found = provenance()
    assert found["no_such_package_version"] is None and found["transformers_version"]


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "repo" / "thing"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }

    def git(*words):
        done = subprocess.run(
            ["git", *words], cwd=package.parent, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", "thing")
    git("commit", "-qm", "first")
    return package, git


def test_git_state_of_a_checkout(checkout):
    package, git = checkout
    commit = git("rev-parse", "HEAD")
    assert git_state(package) == (commit, False)
    (package.parent / "run.log").write_text("a run leaves files beside the package")
    assert git_state(package) == (commit, False)
    (package / "__init__.py").write_text("x = 1")
    assert git_state(package) == (commit, True)
    git("checkout", "--", "thing")
    (package / "new.py").write_text("")
    assert git_state(package) == (commit, True)


def test_git_state_ignores_the_environment_of_a_hook(checkout, tmp_path, monkeypatch):
    package, git = checkout
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_state(package) == (git("rev-parse", "HEAD"), False)


def test_no_commit_for_a_package_installed_below_another_checkout(checkout):
    package, _ = checkout
    installed = package.parent / "venv" / "mmfuse"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_state(installed) == (None, None)


def test_no_commit_outside_a_checkout_nor_without_git(checkout, tmp_path, monkeypatch):
    assert git_state(tmp_path) == (None, None)
    assert git_state(tmp_path / "missing") == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout[0]) == (None, None)
