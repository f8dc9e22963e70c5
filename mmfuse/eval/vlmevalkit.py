"""A model for VLMEvalKit: `infer_data_job(model=MmfuseVLM("runs/aki/model"), …)`, without a change to its tables.

VLMEvalKit has no plugins; its functions take an object that offers what its `BaseModel` does. That was written
down from notes on its interface and has not been run against an installed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmfuse.errors import DataError
from mmfuse.eval.engine import NetworkEngine
from mmfuse.eval.lmms import MAX_NEW_TOKENS, asked
from mmfuse.models import MultimodalLM, MultimodalProcessor

_KINDS = {"text": "text", "image": "url"}


class MmfuseVLM:
    """An mmfuse checkpoint that answers one message at a time.

    Args:
        model_path: a model saved by `save_pretrained`, such as the folder `model` of a run.
        max_new_tokens: after which an answer is cut.
    """

    is_api = False
    interleave = True

    def __init__(self, model_path: str, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        model: Any = MultimodalLM.from_pretrained(Path(model_path))
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.engine = NetworkEngine(model, MultimodalProcessor.from_pretrained(Path(model_path)))
        self.max_new_tokens = max_new_tokens
        self.dump_image: Callable[..., Any] | None = None

    def use_custom_prompt(self, dataset: str) -> bool:
        """Prompts are those of VLMEvalKit."""
        return False

    def set_dump_image(self, dump_image: Callable[..., Any]) -> None:
        """VLMEvalKit passes what writes a row's images to files."""
        self.dump_image = dump_image

    def generate(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The greedy answer to `[{"type": "image" | "text", "value"}, …]`.

        Raises:
            DataError: another kind of part, or an image that cannot be read.
        """
        return self.generate_inner(message, dataset)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """See `generate`."""
        name = dataset or "message"
        other = sorted({part["type"] for part in message} - _KINDS.keys())
        if other:
            raise DataError(f"{name}: messages hold {other[0]!r}; mmfuse takes text and images from VLMEvalKit")
        parts = [{"type": part["type"], _KINDS[part["type"]]: part["value"]} for part in message]
        own = asked(name, [{"role": "user", "content": parts}], {"max_new_tokens": self.max_new_tokens})
        return self.engine.generate([own.item], [own.media], own.max_new_tokens)[0].text
