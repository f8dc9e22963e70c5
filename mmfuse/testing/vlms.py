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
from typing import Any, Final, cast

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from mmfuse.errors import unknown

# Its config classes are generated, and type checkers misread how they are called.
hf: Any = transformers

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

IMAGE_TOKEN_ID: Final = SPECIAL.index("<image>")

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


def tiny_tokenizer(*more: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `WORDS`, which puts `<s>` in front.

    Args:
        *more: further special tokens.
        **named: further special tokens that processors find by attributes of these names.
    """
    special = tuple(dict.fromkeys((*SPECIAL, *more, *named.values())))
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
        extra_special_tokens={"image_token": "<image>", **named},
        model_input_names=["input_ids", "attention_mask"],
    )


Built = tuple[PreTrainedModel, ProcessorMixin]


def _decoder(model_type: str, overrides: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **DECODER, **more, **overrides}


def _tower(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TOWER, **more}


def _size() -> dict[str, int]:
    return {"height": 16, "width": 16}


def _pinpoints() -> list[list[int]]:
    """The resolutions that tiles of 16 × 16 may cover."""
    return [[16, 32], [32, 16], [32, 32]]


def _chat_template(image: str = "<image>") -> str:
    return CHAT_TEMPLATE.replace("<image>", image)


def _llava(**overrides: Any) -> Built:
    config = hf.LlavaConfig(
        vision_config=_tower("clip_vision_model"),
        text_config=_decoder("llama", overrides),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=4,
    )
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size=_size(), crop_size=_size()),
        tiny_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat_template(),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _llava_next(**overrides: Any) -> Built:
    config = hf.LlavaNextConfig(
        vision_config=_tower("clip_vision_model"),
        text_config=_decoder("mistral", overrides, sliding_window=None),
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=_pinpoints(),
    )
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=_size(), image_grid_pinpoints=_pinpoints()),
        tiny_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat_template(),
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def _llava_onevision(**overrides: Any) -> Built:
    tokenizer = tiny_tokenizer(video_token="<video>")
    config = hf.LlavaOnevisionConfig(
        vision_config=_tower("siglip_vision_model", vision_use_head=False),
        text_config=_decoder("qwen2", overrides),
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=_pinpoints(),
        vision_aspect_ratio="anyres_max_2",
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessorPil(size=_size(), image_grid_pinpoints=_pinpoints()),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=_size()),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=_chat_template(),
        vision_aspect_ratio="anyres_max_2",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _tile_tokenizer() -> PreTrainedTokenizerFast:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    more = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles]
    return tiny_tokenizer(*more, video_token="<video>")


def _idefics3(**overrides: Any) -> Built:
    config = hf.Idefics3Config(
        vision_config=_tower("idefics3_vision", patch_size=4),
        text_config=_decoder("llama", overrides),
        image_token_id=IMAGE_TOKEN_ID,
        scale_factor=2,
    )
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessorPil(**sizes), _tile_tokenizer(), image_seq_len=4, chat_template=_chat_template()
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


def _smolvlm(**overrides: Any) -> Built:
    config = hf.SmolVLMConfig(
        vision_config=_tower("smolvlm_vision", patch_size=4),
        text_config=_decoder("llama", overrides),
        image_token_id=IMAGE_TOKEN_ID,
        scale_factor=2,
    )
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessorPil(**sizes),
        _tile_tokenizer(),
        hf.SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=_chat_template(),
    )
    return hf.SmolVLMForConditionalGeneration(config), processor


def _paligemma(**overrides: Any) -> Built:
    image_processor = hf.SiglipImageProcessorPil(size=_size())
    image_processor.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(image_processor, tiny_tokenizer(), chat_template=_chat_template())
    config = hf.PaliGemmaConfig(
        vision_config=_tower("siglip_vision_model", vision_use_head=False, projection_dim=32),
        text_config=_decoder("gemma", overrides, head_dim=8, vocab_size=len(processor.tokenizer)),
        image_token_index=IMAGE_TOKEN_ID,
        projection_dim=32,
        hidden_size=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def _gemma3(**overrides: Any) -> Built:
    tokenizer = tiny_tokenizer(boi_token="<boi>", eoi_token="<eoi>")
    sliding = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    config = hf.Gemma3Config(
        vision_config=_tower("siglip_vision_model", patch_size=4, vision_use_head=False),
        text_config=_decoder("gemma3_text", overrides, head_dim=8, query_pre_attn_scalar=8, **sliding),
        image_token_index=IMAGE_TOKEN_ID,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        mm_tokens_per_image=4,
        initializer_range=0.2,
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size=_size()),
        tokenizer,
        image_seq_length=4,
        chat_template=_chat_template("<boi>"),
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    # It starts at 0, which would make all images alike.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model, processor


def _qwen_parts() -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments of the processor, and ids of the config."""
    tokenizer = tiny_tokenizer("<vision_start>", "<vision_end>", video_token="<video>")
    patches = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    parts = {
        "image_processor": hf.Qwen2VLImageProcessorPil(**patches),
        "tokenizer": tokenizer,
        "video_processor": hf.Qwen2VLVideoProcessor(**patches),
        "chat_template": _chat_template("<vision_start><image><vision_end>"),
    }
    marks = ("vision_start", "vision_end", "image", "video")
    ids = {f"{name}_token_id": cast(int, tokenizer.convert_tokens_to_ids(f"<{name}>")) for name in marks}
    return parts, ids


def _qwen2_vl(**overrides: Any) -> Built:
    parts, ids = _qwen_parts()
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
    text_config = _decoder("qwen2_vl_text", overrides, rope_parameters=rope)
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text_config, **ids)
    return hf.Qwen2VLForConditionalGeneration(config), hf.Qwen2VLProcessor(**parts)


def _qwen2_5_vl(**overrides: Any) -> Built:
    parts, ids = _qwen_parts()
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    text_config = _decoder("qwen2_5_vl_text", overrides, rope_parameters=rope)
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text_config, **ids)
    return hf.Qwen2_5_VLForConditionalGeneration(config), hf.Qwen2_5_VLProcessor(**parts)


def _internvl(**overrides: Any) -> Built:
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    tokenizer = tiny_tokenizer(**marks, video_token="<video>")
    config = hf.InternVLConfig(
        vision_config=_tower("internvl_vision", patch_size=4),
        text_config=_decoder("qwen2", overrides),
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessorPil(size=_size(), crop_to_patches=True, max_patches=2),
        tokenizer,
        hf.InternVLVideoProcessor(size=_size()),
        image_seq_length=4,
        chat_template=_chat_template(),
    )
    return hf.InternVLForConditionalGeneration(config), processor


#: By the `model_type` of the architecture.
VLMS: Final[Mapping[str, Callable[..., tuple[PreTrainedModel, ProcessorMixin]]]] = MappingProxyType(
    {
        "llava": _llava,
        "llava_next": _llava_next,
        "llava_onevision": _llava_onevision,
        "idefics3": _idefics3,
        "smolvlm": _smolvlm,
        "paligemma": _paligemma,
        "gemma3": _gemma3,
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "internvl": _internvl,
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
