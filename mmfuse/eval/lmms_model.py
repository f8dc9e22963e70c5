"""The model that lmms-eval makes; see `mmfuse.eval.lmms`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms

from mmfuse.eval.batching import Backoff, plan_batches
from mmfuse.eval.engine import NetworkEngine
from mmfuse.eval.lmms import Asked, asked, cut, unpack
from mmfuse.eval.tasks.items import Request
from mmfuse.models import MultimodalLM, MultimodalProcessor

BATCH_TOKENS = 16384


class MmfuseChat(lmms):
    """An mmfuse checkpoint, answering chat requests.

    Args:
        pretrained: a model saved by `save_pretrained`, such as the folder `model` of a run.
        batch_size: requests that are answered together at most.
        device: where it runs; a GPU if there is one, else the CPU.
        max_batch_size: not used; lmms-eval passes it.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None, max_batch_size: int | None = None
    ) -> None:
        super().__init__()
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = MultimodalLM.from_pretrained(Path(pretrained))
        processor = MultimodalProcessor.from_pretrained(Path(pretrained))
        self.engine = NetworkEngine(model.to(place).eval(), processor)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers in the order of the requests."""
        held = []
        for number, request in enumerate(requests):
            _, messages, settings, doc_id, task, split = unpack(request.args)
            document = self.task_dict[task][split][doc_id]
            held.append(asked(f"{task}-{doc_id}-{number}", messages(document), settings))
        answers: dict[int, str] = {}
        for longest in sorted({own.max_new_tokens for own in held}):
            places = [i for i, own in enumerate(held) if own.max_new_tokens == longest]
            for batch in self._planned([held[i] for i in places], longest):
                found = Backoff().run([places[i] for i in batch], lambda some: self._generate(held, some))
                answers |= dict(found)
        return [answers[i] for i in range(len(held))]

    def _generate(self, held: Sequence[Asked], places: Sequence[int]) -> list[tuple[int, str]]:
        own = [held[i] for i in places]
        made = self.engine.generate([o.item for o in own], [o.media for o in own], own[0].max_new_tokens)
        return [(i, cut(answer.text, o.until)) for i, o, answer in zip(places, own, made, strict=True)]

    def _planned(self, held: Sequence[Asked], extra: int) -> list[tuple[int, ...]]:
        lengths = [self.engine.lengths(own.item, Request.GENERATE) for own in held]
        return [b.items for b in plan_batches(lengths, BATCH_TOKENS, extra=extra, most=self.batch_size)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported.

        Raises:
            NotImplementedError: always: lmms-eval compares continuations without the token that ends them, which an
                engine does not give.
        """
        raise NotImplementedError("lmms-eval's likelihood tasks are not supported; `mmfuse eval` ranks options")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("answers over several rounds are not supported")
