"""AdoptedLM: a Hugging Face vision-language model whose decoder runs under a fusion strategy.

The model stays what it is, tower, projector, decoder and head under their own names (`vlm.…`); what changes is who
walks through its decoder: our layer loop, with a Visibility where Hugging Face passes a mask.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Cache, PreTrainedConfig, PreTrainedModel

from mmfuse.errors import ConfigError
from mmfuse.fusion import IGNORED_LABEL, DecoderShape, Fusion, build_fusion
from mmfuse.models.adopt.base import EncodedMedia
from mmfuse.models.adopt.config import NATIVE, AdoptedConfig
from mmfuse.models.adopt.families import adapter_for
from mmfuse.models.adopt.generation import AdoptedGenerationMixin
from mmfuse.models.adopt.packing import packed
from mmfuse.models.attention import ATTENTION, Recorder
from mmfuse.models.modeling import Embedded, MultimodalLM, MultimodalOutput, mark_initialised
from mmfuse.sequence import Modality, TokenMap


class Decoder(nn.Module):
    """The decoder of an adopted model in the form of a causal LM; it shares the modules."""

    def __init__(self, model: nn.Module, lm_head: nn.Module, config: PreTrainedConfig) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head
        self.config = config


class AdoptedLM(AdoptedGenerationMixin, MultimodalLM):
    """A Hugging Face vision-language model under a fusion strategy; made by `MultimodalLM.from_vlm`.

    Args:
        config: says which model and which fusion.
        vlm: the model itself, which becomes part of this one; built with random weights if not given.

    Attributes:
        vlm: the model, with all of its own names.
        adapter: what mmfuse knows of its architecture.
    """

    config_class = AdoptedConfig  # type: ignore[assignment]  # in place of MultimodalLM's
    config: AdoptedConfig

    def __init__(self, config: AdoptedConfig, vlm: PreTrainedModel | None = None) -> None:
        PreTrainedModel.__init__(self, config)  # not MultimodalLM's, which builds other parts
        self.adapter = adapter_for(config.vlm_config.model_type)
        self.input_names = {"image": "pixel_values"}
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config) if vlm is None else vlm
        cast(Any, self.adapter.language_model(self.vlm)).config._attn_implementation = ATTENTION
        self.fusion = self.adapter.native(self.vlm) if config.fusion == NATIVE else build_fusion(config.fusion)
        self.fusion.check_layers(config.text_config.num_hidden_layers)
        self.fusion.build(DecoderShape.of(config.text_config), self._new_connector, tuple(self.connectors))
        self.fusion.start_from(dict(self.connectors.items()))
        for part in (self.vlm, self.fusion):
            mark_initialised(part)
        self.post_init()

    # The parts, by the names that mmfuse has for them. They are found anew each time: tools replace modules.

    @property
    def encoders(self) -> nn.ModuleDict:  # type: ignore[override]
        """The vision tower."""
        return nn.ModuleDict({"image": self.adapter.tower(self.vlm)})

    @property
    def connectors(self) -> nn.ModuleDict:  # type: ignore[override]
        """The projector."""
        return nn.ModuleDict({"image": self.adapter.projector(self.vlm)})

    @property
    def decoder(self) -> Decoder:
        """Language model and head."""
        return Decoder(self.adapter.language_model(self.vlm), cast(Any, self.vlm).lm_head, self.config.text_config)

    def parts(self) -> dict[str, nn.Module]:
        more = nn.ParameterList(self.adapter.connector_parameters(self.vlm))
        return {**super().parts(), "connector": nn.ModuleList([self.connectors, more])}

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def visual_tokens(self, modality: str = "image") -> int:
        if not self.adapter.fixed_length:
            raise ValueError(f"images of a {self.config.vlm_config.model_type} become different numbers of tokens")
        with torch.no_grad():
            return len(self._encode(self.adapter.blank(self.vlm)).tokens)

    def input_shape(self, modality: str = "image") -> tuple[int, ...]:
        return tuple(self.adapter.blank(self.vlm)["pixel_values"].shape[1:])

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        tokens: TokenMap | None = None,
        media: EncodedMedia | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool = True,
        fusion: Fusion | None = None,
        record: Recorder | None = None,
        return_dict: bool = True,
        **inputs: Tensor | None,
    ) -> MultimodalOutput:
        """One pass over a batch, such as the model's own processor makes it.

        Args:
            input_ids: `[B, S]`; image slots hold the model's own placeholder id.
            tokens: what every token is; covers cached tokens too, `[B, cached + S]`. Made by `token_map` if not given.
            media: images that `encode_media` has encoded, instead of their pixels.
            labels: `[B, S]` target ids (not shifted), -100 where there is no loss.
            attention_mask: `[B, S]`, 0 on padding; only read when `tokens` is not given.
            past_key_values: keys and values of earlier calls.
            use_cache: return a cache (a new one if none was given).
            logits_to_keep: only the logits of the last so many tokens; 0 for all.
            return_logits: False saves the `[B, S, V]` logits when only the loss is wanted.
            fusion: a strategy without parameters to use in place of the model's own.
            record: is given each layer's attention weights.
            return_dict: always True; Hugging Face's generation says so explicitly.
            **inputs: `pixel_values` and what else the model's own processor gives.

        Raises:
            TypeError: an input that the model does not take.
            ValueError: placeholders and features that disagree, labels that supervise what the fusion leaks, or a map
                that does not cover the tokens.
        """
        if not return_dict:
            raise ValueError("MultimodalLM returns a MultimodalOutput; return_dict=False is not supported")
        given = self._checked(inputs)
        media = self.encode_media(given) if media is None else media
        if tokens is None:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("with a filled cache, `tokens` must describe the cached tokens and the new ones")
            tokens = self.token_map(input_ids, attention_mask, labels=labels, media=media, **given)
        new = tokens.columns(len(tokens) - input_ids.shape[1])
        return self._decode(
            self._embed_encoded(input_ids, new, media),
            tokens,
            fusion=fusion,
            labels=labels,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_logits=return_logits,
            record=record,
        )

    def prepared(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with its `tokens`, and `media` in place of the pixels: images go through the tower once.

        Where the batch says in `rows [N]` which row each of its chats goes into, they are packed.
        """
        if "tokens" in batch:
            return dict(batch)
        names = (*self.adapter.image_inputs, *self.adapter.token_inputs)
        media = self.encode_media(batch)
        tokens = self.token_map(
            batch["input_ids"],
            batch.get("attention_mask"),
            labels=batch.get("labels"),
            media=media,
            **{name: batch[name] for name in names if name in batch},
        )
        kept = {name: value for name, value in batch.items() if name not in (*names, "attention_mask", "rows")}
        kept |= {"tokens": tokens, "media": media}
        return kept if batch.get("rows") is None else packed(kept, batch["rows"])

    def encode_media(self, inputs: Mapping[str, Tensor]) -> EncodedMedia | None:
        """The images among the `inputs` behind tower and projector; None if there are none."""
        if inputs.get("pixel_values") is None:
            return None
        return self._encode({name: inputs[name] for name in self.adapter.image_inputs if name in inputs})

    def token_map(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        media: EncodedMedia | None = None,
        **inputs: Tensor,
    ) -> TokenMap:
        """A map of what the model's own processor gives, one document a row, with the model's own positions.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`, 0 on padding.
            labels: `[B, S]`; text that is supervised is an answer, beside what the processor's output calls one.
            media: the images, whose lengths tell adjacent ones apart.
            **inputs: what else the processor gives.
        """
        live = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        is_image = (input_ids == self.config.media_token_ids["image"]) & (live > 0)
        answers = self.adapter.answers(inputs)
        if labels is not None:
            supervised = labels != IGNORED_LABEL
            answers = supervised if answers is None else answers | supervised
        position, grid = self.adapter.positions(self.vlm, input_ids, live, inputs)
        return TokenMap.from_columns(
            is_image * int(Modality.IMAGE),
            live > 0,
            answers=answers,
            lengths=media.lengths if media is not None else (),
            position=position,
            grid=grid,
        )

    def _checked(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if value is not None}
        known = (*self.adapter.image_inputs, *self.adapter.token_inputs)
        if unused := sorted(given.keys() - set(known)):
            raise TypeError(
                f"a {self.config.vlm_config.model_type} takes {', '.join(known)} beside the text; "
                f"{', '.join(unused)} is not supported"
            )
        return given

    def _encode(self, inputs: Mapping[str, Tensor]) -> EncodedMedia:
        device = cast(Tensor, self.get_input_embeddings().weight).device
        return self.adapter.encode(self.vlm, {name: value.to(device) for name, value in inputs.items()})

    def _embed_encoded(self, input_ids: Tensor, tokens: TokenMap, media: EncodedMedia | None) -> Embedded:
        """Token embeddings with the images in their slots."""
        slots = tokens.modality == Modality.IMAGE
        # Placeholder ids may lie outside the embedding table.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(slots, 0))
        if media is None and bool(slots.any()):
            raise ValueError(f"the batch has {int(slots.sum())} image tokens but no images were given")
        if media is None and not self.training:
            return Embedded(embeds, {})
        if media is None:
            # Every rank must run the same collectives, so a training batch without an image still runs the tower.
            media = self._encode(self.adapter.blank(self.vlm))
            embeds = embeds + 0.0 * media.tokens.sum()
        elif len(media.tokens) != int(slots.sum()):
            raise ValueError(
                f"{int(slots.sum())} image placeholders in the batch (by sample: {slots.sum(1).tolist()}) but "
                f"{len(media.tokens)} features (by image: {list(media.lengths)})"
            )
        else:
            embeds = embeds.masked_scatter(slots.unsqueeze(-1), media.tokens.to(embeds.dtype))
        return Embedded(embeds, {"image": media.features}, {"image": media.arrange})

    def _new_connector(self, modality: str) -> nn.Module:
        """One more projector like the model's own, with parameters of its own."""
        return copy.deepcopy(self.connectors[modality])


def adopt(
    vlm: str | PathLike[str] | PreTrainedModel,
    fusion: str | Mapping[str, Any] = NATIVE,
    attention_backend: str = "auto",
    **loading: Any,
) -> AdoptedLM:
    """`MultimodalLM.from_vlm`."""
    if isinstance(vlm, PreTrainedModel):
        if loading:
            raise ConfigError(f"{', '.join(sorted(loading))} is for loading a folder, and a model was given")
        adapter_for(vlm.config.model_type)
        # A copy: the two models must not share a config that names the attention function, nor weights that train.
        own = copy.deepcopy(vlm)
    else:
        if loading.get("trust_remote_code"):
            raise ConfigError("from_vlm runs no code from checkpoints: trust_remote_code is not supported")
        settings, _ = PreTrainedConfig.get_config_dict(vlm, **loading)
        adapter_for(settings.get("model_type"))
        own = AutoModelForImageTextToText.from_pretrained(vlm, **loading)
    config = AdoptedConfig(own.config, fusion, attention_backend, dtype=own.dtype)
    model = AdoptedLM(config, own)
    if own.generation_config is not None:
        model.generation_config = copy.deepcopy(own.generation_config)
        # Which cache fits is a question of the fusion; `generate` would refuse two answers.
        model.generation_config.cache_implementation = None
    return model.train(own.training)
