"""Random offline vision-language models of Hugging Face with their own processors, for tests of what adopts them.

    vlm, processor = tiny_vlm("llava")
    vlm.save_pretrained(folder)
    processor.save_pretrained(folder)

All have two decoder layers of width 32, a tower of one or two layers, and weights with a standard deviation of 0.2, so
that logits feel the mask. The tokenizer knows words of a small fixed vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from mmfuse.errors import unknown

_WORDS = "user assistant what is in this picture a cat dog on the mat and or one two three left of right red blue : ? ."
WORDS: Final = tuple(_WORDS.split())
SPECIAL: Final = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
VOCABULARY: Final = 64

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% else %}"
    "{{ part['text'] + ' ' }}{% endif %}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{% generation %}</s>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)

DECODER: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
TOWER: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
)


def tiny_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `WORDS`, which puts `<s>` in front, with `more` special tokens behind the usual ones."""
    special = (*SPECIAL, *more)
    vocabulary = {word: i for i, word in enumerate((*special, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _llava(**overrides: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER},
        text_config={"model_type": "llama", **DECODER, **overrides},
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=4,
    )
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tiny_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


#: By the `model_type` of the architecture.
VLMS: Final[Mapping[str, Callable[..., tuple[PreTrainedModel, ProcessorMixin]]]] = MappingProxyType(
    {
        "llava": _llava,
    }
)


def tiny_vlm(family: str = "llava", *, seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model in evaluation mode, and its processor.

    Args:
        family: the `model_type` of the architecture, see `VLMS`.
        seed: of the weights; the caller's random state is left alone.
        **overrides: fields of the decoder's config.
    """
    if family not in VLMS:
        raise ValueError(unknown("vision-language model", family, VLMS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm, processor = VLMS[family](**overrides)
    return vlm.eval(), processor
