"""Many questions about one image: what stands before them is read once, and its cache serves them all.

That is exact where nothing before a question depends on it: under `causal`, `naavit`, `saisa`, `composite`,
`cross_attention` and `hyper_attention`. Strategies that let media look ahead at the question (`mma`, `prefix_lm`,
`moda`) refuse the cache.

Shapes: `Q` questions, `P` tokens of the prefix, `S` tokens in all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mmfuse.models.modeling import MultimodalLM
from mmfuse.sequence import TokenMap


class PrefixCache:
    """The cache of a prefix, such as a system prompt and an image.

    Args:
        model: in evaluation mode.
        input_ids: `[1, P]`.
        tokens: their map.
        **media: the media of the prefix, as `forward` takes them.

    Raises:
        ValueError: more than one sample, or padding.
    """

    def __init__(self, model: MultimodalLM, input_ids: Tensor, tokens: TokenMap, **media: Tensor) -> None:
        if input_ids.shape[0] != 1 or bool(tokens.is_pad.any()):
            raise ValueError(f"a prefix is one sample without padding, got input_ids {list(input_ids.shape)}")
        self.model, self.input_ids, self.tokens = model, input_ids, tokens
        with torch.inference_mode():
            output = model(input_ids, tokens, use_cache=True, return_logits=False, **media)
        self._cache: Cache = output.past_key_values

    def __len__(self) -> int:
        """The number of tokens `P`."""
        return len(self.tokens)

    def cache(self, questions: int = 1) -> Cache:
        """A copy for so many questions, which a `forward` or `generate` call may extend."""
        copied = copy.deepcopy(self._cache)
        if questions > 1:
            copied.batch_repeat_interleave(questions)
        return copied

    def generate(self, input_ids: Sequence[Tensor], tokens: Sequence[TokenMap], **kwargs: Any) -> list[Tensor]:
        """Hugging Face's `generate` for prompts that begin with the prefix and go on as text.

        Prompts are batched; in decoders with sliding windows only those of equal length, because there padding between
        prefix and question would push the prefix out of the window.

        Args:
            input_ids: of each prompt, prefix included: `[1, S]`.
            tokens: their maps.
            **kwargs: as `generate` takes them.

        Returns:
            The new tokens of each prompt, `[new]`, filled up with the padding token.

        Raises:
            ValueError: a prompt that does not begin with the prefix, or a strategy in whose prefix tokens have looked
                at the question.
        """
        for number, (ids, sample) in enumerate(zip(input_ids, tokens, strict=True)):
            same = len(sample) > len(self) and torch.equal(ids[:, : len(self)], self.input_ids)
            if not same or bool(sample.columns(len(self)).is_media.any()):
                raise ValueError(f"prompt {number} does not consist of the prefix and text behind it")
        made: dict[int, Tensor] = {}
        for group in self._groups([len(sample) for sample in tokens]):
            out = self._generate([input_ids[i] for i in group], [tokens[i] for i in group], **kwargs)
            made |= dict(zip(group, out, strict=True))
        return [made[number] for number in range(len(input_ids))]

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        numbers = range(len(lengths))
        if not any(self._cache.is_sliding):
            return [list(numbers)]
        return [[i for i in numbers if lengths[i] == length] for length in sorted(set(lengths))]

    def _generate(self, input_ids: list[Tensor], tokens: list[TokenMap], **kwargs: Any) -> Tensor:
        count, start = len(tokens), len(self)
        maps = TokenMap.batch([sample.columns(start) for sample in tokens], side="left")
        padding = self.model.config.pad_token_id or 0
        rest = torch.full(maps.shape, padding, dtype=torch.long, device=self.input_ids.device)
        rest[~maps.is_pad] = torch.cat([ids[0, start:] for ids in input_ids])
        whole = torch.cat([self.input_ids.expand(count, -1), rest], dim=1)
        out: Tensor = self.model.generate(
            whole, self.tokens.repeat(count).followed_by(maps), past_key_values=self.cache(count), **kwargs
        )
        return out[:, whole.shape[1] :]
