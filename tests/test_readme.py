"""Every command of the README is run here, or is a target that CI runs; its Python code runs as it stands."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfuse.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
#: A smaller run than the config's own, for every command that reads the config.
SMALL = {
    "data": {
        "class_path": "HandwritingData",
        "init_args": {"batch_size": 8, "scenes": {"align": 32, "instruct": 32, "val": 14, "test": 14, "weights": {}}},
    },
    "trainer": {"max_steps": 3, "val_check_interval": 3},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make ")])
def test_targets_exist_and_ci_or_a_test_runs_them(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    # `make fit` is `mmfuse fit --config configs/aki.yaml` behind the set-up that `make test` has, too.
    assert target == "fit" or f"make {target}" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs, of which the demo's is small."""
    monkeypatch.setenv("MMFUSE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    demo = tmp_path / "configs" / "aki.yaml"
    demo.write_text(yaml.safe_dump(merged(yaml.safe_load(demo.read_text()), SMALL)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {
        k: merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in more.items()
    }
    return {**base, **both}


def run(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "mmfuse", f"no test knows how to run {line!r}"
    assert main(words[1:]) == 0, line


#: Those that start several runs, or build models of the size of the papers.
LONG = ("mmfuse compare", "mmfuse profile")


def test_every_command_runs_in_order(newcomer: Path) -> None:
    for line in commands():
        if not line.startswith(("make ", *LONG)):
            run(line)
    assert (newcomer / "runs" / "aki" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in commands() if line.startswith(LONG)])
def test_long_commands_run(line: str, newcomer: Path) -> None:
    run(line)
    if "compare" in line:
        assert (newcomer / "runs" / "aki-compare" / "compare.md").exists()


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102  # safe: our own page
    assert "torch.Size(" in capsys.readouterr().out
