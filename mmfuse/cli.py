"""The `mmfuse` command: finds the command that was asked for and imports only that one.

Only the standard library is imported here, so that `mmfuse --help` answers at once (Lightning takes seconds).
A command is a function that takes its words as `sys.argv` has them after the program, its own name first
(`["fit", "--config", "configs/aki.yaml"]`), and returns an exit code or None, which means 0.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmfuse import __version__
from mmfuse.errors import ConfigError, DataError, RunError, StoppedError, unknown

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

USER_ERRORS = (ConfigError, DataError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class Command(NamedTuple):
    """Where a command lives and what it does, in one line."""

    module: str
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "fit": Command("mmfuse.training.cli", "main", "train a model, evaluate it and write a report"),
    "validate": Command("mmfuse.training.cli", "main", "compute the validation loss of a checkpoint"),
    "test": Command("mmfuse.training.cli", "main", "evaluate a checkpoint on held-out questions"),
    "predict": Command("mmfuse.training.cli", "main", "write a checkpoint's answers for a data set"),
    "compare": Command("mmfuse.training.commands", "compare", "train several fusions, all else equal, in one table"),
    "export": Command("mmfuse.training.export", "main", "write a run as an adapter or a checkpoint for other tools"),
    "generate": Command("mmfuse.training.commands", "generate", "answer one prompt, with or without an image"),
    "explain": Command("mmfuse.training.commands", "explain", "show a batch: tokens, labels, who attends to whom"),
    "eval": Command("mmfuse.training.evaluation", "evaluate", "let a model answer tasks, score them, write a report"),
    "compare-eval": Command("mmfuse.training.evaluation", "compare", "two evaluations, compared pair by pair"),
    "diagnose": Command("mmfuse.training.diagnosis", "main", "does a model use its media, and where? with pictures"),
    "score": Command("mmfuse.eval.scorers.command", "main", "score a file of predictions by a task's rules"),
    "tasks": Command("mmfuse.eval.datasets.command", "main", "name the benchmarks and check for their files"),
    "profile": Command("mmfuse.training.profile", "main", "what strategies cost: FLOPs, parameters, memory, latency"),
    "kernels": Command("mmfuse.training.kernels", "main", "which attention backend runs a mask of a shape, and why"),
    "data": Command("mmfuse.training.data_commands", "main", "pack data into shards, lint, count and show them"),
    "verify-resume": Command(
        "mmfuse.training.verify_resume", "main", "kill a run many times, compare with a whole one"
    ),
    "chaos": Command("mmfuse.training.chaos.command", "main", "break a run in known ways and say whether it survives"),
    "list": Command("mmfuse.training.commands", "list_", "name the fusions, encoders, connectors and the rest"),
}


def help_text(commands: Mapping[str, Command]) -> str:
    """The text of `mmfuse --help`."""
    width = max(len(name) for name in commands)
    lines = [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    return "\n".join(
        [
            "usage: mmfuse COMMAND [OPTIONS]",
            "",
            "Multimodal language models whose fusion mechanism is one line of a config.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help     show this help; `mmfuse COMMAND --help` shows a command's own",
            "  -V, --version  show the version",
            "",
            "start here:  mmfuse fit --config configs/aki.yaml",
            "exit codes:  0 done, 1 a failure inside, 2 a mistake in the request, 130 interrupted, 143 stopped, saved",
            "MMFUSE_DEBUG=1 shows the traceback of a mistake, too.",
        ]
    )


def fail(message: str, code: int = EXIT_USER_ERROR) -> int:
    """Print `message` as one line on stderr and return the exit code."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"mmfuse: error: {line}", file=sys.stderr)
    return code


def describe(error: Exception) -> str:
    """What went wrong, without Python's `[Errno 2]`; the name of the exception if it says nothing."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def run(command: Command, argv: Sequence[str]) -> int:
    """Import and run one command; turn a user's mistake into one line and exit code 2, a run that failed into code 1.

    Any other exception is a bug, or a failure of the machine, and keeps its traceback.
    """
    try:
        function = getattr(importlib.import_module(command.module), command.function)
        return function(list(argv)) or EXIT_OK
    except StoppedError as stop:
        print(f"mmfuse: {stop}", file=sys.stderr)
        return stop.exit_code
    except (RunError, *USER_ERRORS) as error:
        if os.environ.get("MMFUSE_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        return fail(describe(error), EXIT_FAILURE if isinstance(error, RunError) else EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("mmfuse: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run `mmfuse` with the words `argv` (default: those of the process) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(help_text(commands), file=sys.stderr)
        return EXIT_USER_ERROR
    first = words[0]
    if first in ("-h", "--help"):
        print(help_text(commands))
        return EXIT_OK
    if first in ("-V", "--version"):
        print(f"mmfuse {__version__}")
        return EXIT_OK
    if first.startswith("-"):
        return fail(unknown("option", first, ["--help", "--version"]))
    if first not in commands:
        return fail(unknown("command", first, commands))
    return run(commands[first], words)
