"""Hugging Face's `generate` for a model whose tokens have a TokenMap and whose media are listed by sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.utils.generic import ModelOutput

from mmfuse.models.media import INPUT_NAMES
from mmfuse.sequence import Modality, TokenMap


class MultimodalGenerationMixin(GenerationMixin):
    """What `generate` asks of a `MultimodalLM`.

    Attributes:
        input_names: by modality, the keyword of its inputs.
    """

    input_names: Mapping[str, str]

    def token_map(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenMap:
        """A map of `input_ids [B, S]` by placeholder ids alone."""
        raise NotImplementedError

    def visual_tokens(self, modality: str = "image") -> int:
        """How many tokens of the decoder one medium becomes."""
        raise NotImplementedError

    def media_inputs(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The inputs that are there, by modality instead of keyword."""
        raise NotImplementedError

    def new_cache(self) -> Cache:
        """An empty cache for the model's strategy."""
        raise NotImplementedError

    def generate(  # type: ignore[override]  # the TokenMap is ours
        self, input_ids: Tensor, tokens: TokenMap | None = None, **kwargs: Any
    ) -> Any:
        """Hugging Face's `generate` with a TokenMap; prompts in a batch are padded on the left.

        Args:
            input_ids: `[B, S]` prompts up to and including the answer header.
            tokens: their map; made from `attention_mask` and the placeholder ids if not given.
            **kwargs: the media of what is not cached, as `forward` takes them, `attention_mask`, and everything that
                Hugging Face's `generate` takes.

        Raises:
            ValueError: a prompt is padded on the right, or media that the model does not take.
        """
        self.media_inputs({name: kwargs.get(name) for name in INPUT_NAMES})
        if tokens is None:
            tokens = self.token_map(input_ids, kwargs.get("attention_mask"))
        if bool(tokens.is_pad[:, -1].any()):
            raise ValueError("generation needs prompts padded on the left: a row ends in padding")
        kwargs["attention_mask"] = (~tokens.is_pad).long()
        if kwargs.get("use_cache") is not False and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self.new_cache()
        return super().generate(input_ids=input_ids, tokens=tokens, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        tokens: TokenMap | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        new = input_ids.shape[1] - cached if next_sequence_length is None else next_sequence_length
        assert tokens is not None
        seen = tokens.columns(len(tokens) - new).modality
        return {
            "input_ids": input_ids[:, -new:],
            "tokens": tokens,
            # Media are given once, with the tokens that stand for them: a later turn may bring new ones.
            **{
                name: kwargs.get(name) if bool((seen == Modality[modality.upper()]).any()) else None
                for modality, name in self.input_names.items()
            },
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep") or 0,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        updated["tokens"] = updated["tokens"].append(kwargs.get("num_new_tokens", 1))
        return updated

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Beams repeat samples; media are listed by sample, so a sample's media are repeated as a group."""
        tokens = model_kwargs.pop("tokens")
        cache = model_kwargs.get("past_key_values")
        cached = cache.get_seq_length() if cache is not None else 0
        if cache is not None and cached and expand_size > 1:
            cache.batch_repeat_interleave(expand_size)
        media = {modality: model_kwargs.pop(name, None) for modality, name in self.input_names.items()}
        repeated_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        for modality, inputs in media.items():
            if inputs is not None and expand_size > 1:
                slots = tokens.columns(cached).modality == Modality[modality.upper()]
                groups = inputs.split((slots.sum(1) // self.visual_tokens(modality)).tolist())
                inputs = torch.cat([group for group in groups for _ in range(expand_size)])
            model_kwargs[self.input_names[modality]] = inputs
        return repeated_ids, {**model_kwargs, "tokens": tokens.repeat(expand_size)}
