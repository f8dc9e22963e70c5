"""`results.json`: the numbers of a run and where they come from, in one flat file."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import torch

import mmfuse

#: The one entry that holds entries itself.
NESTED = "by_family"

_PACKAGES = ("transformers", "lightning")


def write_results(path: str | PathLike[str], **results: Any) -> Path:
    """Write `results` as JSON: the old file or the whole new one, whenever the process is killed.

    Values are text, numbers, booleans, None, or lists of these; only `by_family` holds a table of such tables. JSON
    has no NaN and no infinity, so a number that is not finite (the loss of a run that diverged) becomes null.

    Returns:
        The path.

    Raises:
        TypeError: a value of another kind, named by its key.
    """
    plain: dict[str, Any] = {}
    for key, value in results.items():
        if key == NESTED:
            plain[key] = {
                family: {name: _plain(f"{key}.{family}.{name}", entry) for name, entry in table.items()}
                for family, table in value.items()
            }
        else:
            plain[key] = _plain(key, value)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text_atomically(path, text)


def write_text_atomically(path: str | PathLike[str], text: str) -> Path:
    """Write UTF-8 `text` beside `path` and move it there, making the folder if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def provenance() -> dict[str, Any]:
    """What the numbers were made with; nothing in it names a user, a host or a folder.

    Returns:
        `mmfuse_version`, `torch_version`, … (None for what is not installed), `python_version`, `platform`,
        `cpu_count`, `torch_threads`, `accelerator` (its name, or None), and `git_commit` and `git_dirty` (whether files
        of the package differ from that commit): None unless the package lies in a git checkout that tracks it.
    """
    commit, dirty = git_state(Path(mmfuse.__file__).parent)
    return {
        "mmfuse_version": mmfuse.__version__,
        "torch_version": str(torch.__version__),  # unlike the package's metadata it names the build: 2.14.1+cu130
        **{f"{package}_version": _version(package) for package in _PACKAGES},
        "python_version": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": commit,
        "git_dirty": dirty,
    }


def git_state(package: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that tracks `package`, and whether files of the package differ from it.

    Both are None without git, outside a checkout, and for a package that was installed below somebody else's.
    """
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(package, "rev-parse", "HEAD") if tracked is not None else None
    if commit is None:
        return None, None
    changes = _git(package, "status", "--porcelain", "--", ".")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *words: str) -> str | None:
    # Inside a git hook GIT_DIR and others point at the hook's repository, whatever folder is asked about.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # Without optional locks `git status` never writes to the index that the user may be working with.
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(key: str, value: Any) -> Any:
    """`value` as JSON knows it; scalars of NumPy and torch become numbers."""
    if isinstance(value, list | tuple):
        return [_plain(key, entry) for entry in value]
    if isinstance(value, PathLike | Mapping):
        raise TypeError(f"results: {key} is a {type(value).__name__}; give text, numbers, or lists of these")
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is not None and not isinstance(value, str | bool | int | float):
        raise TypeError(f"results: {key} is a {type(value).__name__}; give text, numbers, or lists of these")
    return value
