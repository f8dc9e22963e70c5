"""The front of the command line: help, version, dispatch, mistakes, exit codes. No command is imported."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import mmfuse
from mmfuse.cli import COMMANDS, Command, main
from mmfuse.errors import ConfigError


def command(argv: list[str]) -> int | None:
    """A command whose behaviour its words choose; without a choice it prints them."""
    match argv[1:]:
        case ["code", code]:
            return int(code)
        case ["config-error"]:
            raise ConfigError("unknown key 'fusio':\n  did you mean 'fusion'?")
        case ["missing-file", path]:
            Path(path).read_text()
        case ["own-missing-file"]:
            raise FileNotFoundError("no checkpoint last.ckpt in runs/aki")
        case ["bug"]:
            raise ValueError("a bug")
        case ["interrupt"]:
            raise KeyboardInterrupt
        case ["exit", code]:
            sys.exit(int(code))
        case _:
            print(argv)
    return None


FAKE = {"fake": Command(__name__, "command", "does what its words say")}


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    listed = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and "  " in line.strip()}
    for name, entry in COMMANDS.items():
        assert entry.help in listed[name]
    training = {"fit", "validate", "test", "predict", "compare", "verify-resume", "chaos"}
    evaluation = {"eval", "compare-eval", "diagnose", "score", "tasks"}
    others = {"generate", "explain", "export", "profile", "kernels", "data", "list"}
    assert set(COMMANDS) == training | evaluation | others


def test_module_and_function_give_the_same_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["-h"])
    ran = python("-m", "mmfuse", "--help")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, capsys.readouterr().out, "")


def test_installed_command_is_this_one() -> None:
    script = Path(sys.executable).with_name("mmfuse")
    if not script.exists():
        pytest.skip("mmfuse is not installed beside this Python")
    ran = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"mmfuse {mmfuse.__version__}\n")


def test_help_takes_less_than_half_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        python("-m", "mmfuse", "--help")
        return time.perf_counter() - start

    # The fastest of several: the claim is about this program, not about what else the machine is doing.
    assert min(seconds() for _ in range(5)) < 0.5


def test_front_imports_only_the_standard_library() -> None:
    code = "import sys, mmfuse.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    bare = set(python("-c", "import sys; print(*{name.partition('.')[0] for name in sys.modules})").stdout.split())
    added = set(python("-c", code).stdout.split()) - bare
    assert "mmfuse" in added
    assert added - {"mmfuse"} <= set(sys.stdlib_module_names)


def test_command_gets_its_own_name_and_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "--config", "x.yaml"], FAKE) == 0
    assert capsys.readouterr().out == "['fake', '--config', 'x.yaml']\n"


@pytest.mark.parametrize("code", [0, 1, 7])
def test_exit_code_of_a_command_is_passed_on(code: int) -> None:
    assert main(["fake", "code", str(code)], FAKE) == code


def test_sys_exit_of_a_command_is_passed_on() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fake", "exit", "2"], FAKE)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["config-error"], "unknown key 'fusio': did you mean 'fusion'?"),
        (["missing-file", "no/such file.yaml"], "no/such file.yaml: No such file or directory"),
        (["own-missing-file"], "no checkpoint last.ckpt in runs/aki"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    line: str,
) -> None:
    monkeypatch.delenv("MMFUSE_DEBUG", raising=False)
    assert main(["fake", *words], FAKE) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"mmfuse: error: {line}\n")


def test_debug_shows_the_traceback_of_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMFUSE_DEBUG", "1")
    assert main(["fake", "own-missing-file"], FAKE) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("mmfuse: error: no checkpoint last.ckpt in runs/aki\n")


def test_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"):
        main(["fake", "bug"], FAKE)


def test_interrupt_exits_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "interrupt"], FAKE) == 130
    assert capsys.readouterr().err == "mmfuse: interrupted\n"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("fitt", "'fit'"), ("generat", "'generate'"), ("--hepl", "'--help'"), ("--versoin", "'--version'")],
)
def test_typo_is_told_what_was_meant(capsys: pytest.CaptureFixture[str], word: str, meant: str) -> None:
    assert main([word]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mmfuse: error: unknown ") and f"did you mean {meant}?" in captured.err


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: mmfuse COMMAND")


def test_module_exits_with_the_code_of_main() -> None:
    ran = python("-m", "mmfuse", "fitt")
    assert ran.returncode == 2 and "did you mean 'fit'?" in ran.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmfuse {mmfuse.__version__}\n"
