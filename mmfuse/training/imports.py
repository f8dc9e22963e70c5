"""What a config may import: `class_path` and callables name Python objects, and importing a module runs it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from jsonargparse import set_parsing_settings

from mmfuse.errors import ConfigError

FLAG: Final = "--allow-import"

#: Packages whose classes a config may name.
ALLOWED: Final = ("mmfuse", "torch", "lightning", "transformers", "peft", "timm", "open_clip")

#: Parts of these packages that load pickles, compile code, start processes or fetch from a network.
DENIED: Final = (
    "lightning.app",
    "lightning.fabric.utilities.cloud_io",
    "lightning.pytorch.cli",
    "lightning.pytorch.core.saving",
    "lightning.pytorch.utilities.migration",
    "timm.models.create_model",
    "timm.create_model",
    "torch.classes",
    "torch.compile",
    "torch.distributed.elastic",
    "torch.distributed.launcher",
    "torch.distributed.rpc",
    "torch.distributed.run",
    "torch.hub",
    "torch.jit",
    "torch.load",
    "torch.multiprocessing",
    "torch.ops",
    "torch.package",
    "torch.save",
    "torch.serialization",
    "torch.utils.bottleneck",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "transformers.commands",
    "transformers.dynamic_module_utils",
    "transformers.pipeline",
    "transformers.pipelines",
)

_NAME: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def restrict_imports(words: Sequence[str]) -> list[str]:
    """Tell jsonargparse what configs may import; to be called before anything is parsed.

    Args:
        words: of the command line; each `--allow-import NAME` in them allows one more package, module or class.

    Returns:
        The words without these.

    Raises:
        ConfigError: `--allow-import` without a name.
    """
    rest, names = [], []
    waiting = iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if flag != FLAG:
            rest.append(word)
            continue
        name = value if equals else next(waiting, "")
        if not _NAME.fullmatch(name) or name.split(".")[0] == "jsonargparse":
            raise ConfigError(f"{FLAG} needs the name of a package, module or class, as in my_package; got {name!r}")
        names.append(name)
    set_parsing_settings(import_path_denylist=["*", *DENIED], import_path_allowlist=[*ALLOWED, *names])
    return rest


def is_allowed(path: str) -> bool:
    """Whether any config may import `path`, with no `--allow-import`."""
    inside = {package: path == package or path.startswith(f"{package}.") for package in (*ALLOWED, *DENIED)}
    return any(inside[name] for name in ALLOWED) and not any(inside[name] for name in DENIED)


def explain_denied(message: str) -> str:
    """What the parser says about an import that is denied, and how to allow it."""
    found = re.search(r"Importing '([\w.]+)' is not allowed", message)
    if found is None:
        return message
    path = found[1]
    return (
        f"a config may not import {path!r}: importing runs code. Allowed are {', '.join(ALLOWED)}; if you trust it, "
        f"add {FLAG} {path.split('.')[0]} to the command"
    )
