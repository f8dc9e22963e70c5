"""Multimodal language models whose fusion mechanism is one line of a config.

Importing this package costs no torch: a public name is imported when it is first used (PEP 562).
`from mmfuse import MultimodalLM` imports `mmfuse.models`, which registers the Auto classes of transformers.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfuse.fusion import Fusion
    from mmfuse.kernels import Visibility, attend
    from mmfuse.models import MultimodalConfig, MultimodalLM, MultimodalProcessor
    from mmfuse.sequence import Modality, Role, TokenMap

__version__ = "0.1.0"

#: When the process imported the package (monotonic seconds): commands report how long they took in all.
STARTED = time.monotonic()

__all__ = [
    "Fusion",
    "Modality",
    "MultimodalConfig",
    "MultimodalLM",
    "MultimodalProcessor",
    "Role",
    "TokenMap",
    "Visibility",
    "__version__",
    "attend",
]

_HOME = {
    "Fusion": "mmfuse.fusion",
    "Modality": "mmfuse.sequence",
    "MultimodalConfig": "mmfuse.models",
    "MultimodalLM": "mmfuse.models",
    "MultimodalProcessor": "mmfuse.models",
    "Role": "mmfuse.sequence",
    "TokenMap": "mmfuse.sequence",
    "Visibility": "mmfuse.kernels",
    "attend": "mmfuse.kernels",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mmfuse' has no attribute {name!r}", name=name, obj=None)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
