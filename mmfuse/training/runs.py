"""Run folders: where a run's files go, and what happens to a run that was there before."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from mmfuse.errors import ConfigError

ROOT = Path("runs")


def default_folder(configs: Sequence[Any] | None) -> Path:
    """`runs/` and the name of the config file; of several, their names in a row: `runs/aki-saisa`.

    Raises:
        ConfigError: there is no config file to name the run after.
    """
    names = [Path(str(config)).stem for config in configs or [] if config is not None]
    if not names:
        raise ConfigError("no --config and no --out: name a config file, or the folder that the run goes to")
    return ROOT / "-".join(names)


@rank_zero_only
def claim_folder(folder: Path, *, resuming: bool) -> None:
    """Make `folder` ready for a fit; an earlier run there that is not resumed is moved aside."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: this is a file; a run needs a folder")
    if folder.exists() and any(folder.iterdir()) and not resuming:
        if not (folder / "config.yaml").exists():
            raise ConfigError(f"--out {folder}: the folder holds other files and no earlier run; choose another one")
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
        print(f"mmfuse: an earlier run was moved from {folder} to {aside}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
