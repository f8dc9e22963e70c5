"""Data: sources of samples, the plan that mixes them, and the handwriting demo.

A public name is imported when it is first used (PEP 562): writing the demo's shards costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfuse.data.augmentation import ImageAugmentation
    from mmfuse.data.loader import StreamLoader, StreamProgress
    from mmfuse.data.plan import Draw, Plan, StagePlan
    from mmfuse.data.samples import Sample, encode_sample, split_answer
    from mmfuse.data.sources import Source, open_source
    from mmfuse.data.stream import BatchStream, Encoding, StreamSettings

__all__ = [
    "BatchStream",
    "Draw",
    "Encoding",
    "ImageAugmentation",
    "Plan",
    "Sample",
    "Source",
    "StagePlan",
    "StreamLoader",
    "StreamProgress",
    "StreamSettings",
    "encode_sample",
    "open_source",
    "split_answer",
]

_HOME = {
    "BatchStream": "mmfuse.data.stream",
    "Draw": "mmfuse.data.plan",
    "Encoding": "mmfuse.data.stream",
    "ImageAugmentation": "mmfuse.data.augmentation",
    "Plan": "mmfuse.data.plan",
    "Sample": "mmfuse.data.samples",
    "Source": "mmfuse.data.sources",
    "StagePlan": "mmfuse.data.plan",
    "StreamLoader": "mmfuse.data.loader",
    "StreamProgress": "mmfuse.data.loader",
    "StreamSettings": "mmfuse.data.stream",
    "encode_sample": "mmfuse.data.samples",
    "open_source": "mmfuse.data.sources",
    "split_answer": "mmfuse.data.samples",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mmfuse.data' has no attribute {name!r}", name=name, obj=None)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
