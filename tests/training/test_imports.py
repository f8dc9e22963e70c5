"""A config names Python objects, and only those of known packages are imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfuse.errors import ConfigError
from mmfuse.training.imports import ALLOWED, is_allowed, restrict_imports

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when the module `payload` is imported or one of its callables runs."""
    found = tmp_path / "code_ran"
    (tmp_path / "payload.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch import Callback\n"
        f"Path({str(found)!r}).touch()\n"
        "class Evil(Callback):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    return found


#: By name what a config may try: a change of the tiny config; `{marker}` is a file that must not appear.
PAYLOADS: dict[str, dict[str, Any]] = {
    "importing a module": {"trainer": {"callbacks": [{"class_path": "payload.Evil"}]}},
    "a shell as a class": {
        "trainer": {"callbacks": [{"class_path": "os.system", "init_args": {"command": "touch {marker}"}}]}
    },
    "a process as a class": {
        "trainer": {"logger": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "{marker}"]}}}
    },
    "data of another module": {"data": {"class_path": "payload.Evil"}},
    "code through an allowed package": {
        "trainer": {"callbacks": [{"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "{marker}"}}]}
    },
    "the allow-list itself": {"trainer": {"callbacks": [{"class_path": "jsonargparse.set_parsing_settings"}]}},
}


def fill(value: Any, marker: Path) -> Any:
    if isinstance(value, dict):
        return {key: fill(inner, marker) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, marker) for inner in value]
    return value.replace("{marker}", str(marker)) if isinstance(value, str) else value


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("words", [[], ["--print_config"]], ids=["run", "print"])
def test_payload_in_a_config_runs_nothing(
    payload: str, words: list[str], mmfuse: Command, write_config: WriteConfig, marker: Path, tmp_path: Path
) -> None:
    config = write_config()
    settings = yaml.safe_load(config.read_text())
    for key, change in fill(PAYLOADS[payload], marker).items():
        settings[key] = change if key == "data" else {**settings[key], **change}
    config.write_text(yaml.safe_dump(settings))
    ran = mmfuse("fit", "--config", config, "--out", tmp_path / "run", *words)
    assert ran.code == 2 and not marker.exists() and "payload" not in sys.modules
    assert "may not import" in ran.err and "--allow-import" in ran.err and ran.err.count("\n") == 1


def test_python_tags_of_yaml_run_nothing(
    mmfuse: Command, write_config: WriteConfig, marker: Path, tmp_path: Path
) -> None:
    config = write_config()
    config.write_text(config.read_text() + f"\nout: !!python/object/apply:os.system ['touch {marker}']\n")
    ran = mmfuse("fit", "--config", config, "--out", tmp_path / "run")
    assert ran.code == 2 and not marker.exists()


@pytest.mark.parametrize("flag", ["--data", "--data.class_path", "--trainer.logger"])
def test_payload_in_a_flag_runs_nothing(
    flag: str, mmfuse: Command, write_config: WriteConfig, marker: Path, tmp_path: Path
) -> None:
    ran = mmfuse("fit", "--config", write_config(), "--out", tmp_path / "run", flag, "payload.Evil")
    assert ran.code == 2 and not marker.exists() and "payload" not in sys.modules


def test_users_package_is_allowed_on_the_command_line(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trusted.py").write_text("from lightning.pytorch import Callback\nclass Mine(Callback):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = write_config({"trainer": {"callbacks": [{"class_path": "trusted.Mine"}]}})
    words = ["fit", "--config", config, "--out", tmp_path / "run", "--print_config"]
    refused = mmfuse(*words)
    assert refused.code == 2 and "add --allow-import trusted to the command" in refused.err
    with pytest.raises(SystemExit) as ended:
        mmfuse(*words, "--allow-import", "trusted")
    assert ended.value.code == 0
    monkeypatch.delitem(sys.modules, "trusted")


def test_words_are_kept_but_for_the_flag() -> None:
    words = ["fit", "--allow-import", "one.two", "--config", "a.yaml", "--allow-import=three"]
    assert restrict_imports(words) == ["fit", "--config", "a.yaml"]


@pytest.mark.parametrize("words", [["--allow-import"], ["--allow-import", "--config"], ["--allow-import=a b"]])
def test_flag_needs_a_name(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--allow-import needs the name of a package"):
        restrict_imports(words)


def test_names_that_configs_may_import() -> None:
    assert all(is_allowed(f"{package}.Something") for package in ALLOWED)
    for name in ("os.system", "torchvision.models.vit", "torch.hub.load", "mmfuse_of_others.Evil", "torch.load"):
        assert not is_allowed(name)
