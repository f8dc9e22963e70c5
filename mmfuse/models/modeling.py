"""MultimodalLM: encoders → connectors → a Hugging Face decoder under a fusion strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mmfuse.errors import ConfigError
from mmfuse.fusion import IGNORED_LABEL, DecoderShape, Fusion, build_fusion
from mmfuse.models.attention import ATTENTION, Recorder
from mmfuse.models.config import MultimodalConfig
from mmfuse.models.connectors import Connector, build_connector
from mmfuse.models.decoder import new_cache, run_decoder, supervised_rows
from mmfuse.models.encoders import Encoder, build_encoder
from mmfuse.models.generation import MultimodalGenerationMixin
from mmfuse.models.media import MEDIA
from mmfuse.sequence import Modality, TokenMap

if TYPE_CHECKING:
    from mmfuse.models.adopt import AdoptedLM


@dataclass
class MultimodalOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: mean cross-entropy over the supervised tokens, float32 scalar; only if labels were given.
        logits: `[B, S, V]`, or only the last `logits_to_keep` rows; None if they were not asked for.
        past_key_values: the cache, if one was used.
        supervised: the number of supervised tokens, int64 scalar; only if labels were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    supervised: Tensor | None = None


@dataclass(frozen=True)
class Embedded:
    """What the decoder starts from.

    Attributes:
        embeds: `[B, S, D]`, with the connectors' tokens in the media slots.
        features: by modality `[N, V, De]`, what each encoder that was run gave to its connector; of the blank medium
            too that stands in for a modality without media in training.
        arrange: see `MediaSource`.
    """

    embeds: Tensor
    features: dict[str, Tensor]
    arrange: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


class MultimodalLM(PreTrainedModel, MultimodalGenerationMixin):
    """A multimodal language model whose fusion strategy is one entry of its config.

    Built offline with random weights from its config. `from_pretrained` and `save_pretrained` are Hugging Face's.

    Args:
        config: says which encoders, connectors, decoder and fusion.

    Attributes:
        input_names: for each modality the keyword by which `forward` takes its inputs.
    """

    config_class = MultimodalConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: list[str] = []  # noqa: RUF012  (the type that transformers expects here)

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        encoders = {name: build_encoder(spec) for name, spec in config.encoders.items()}
        self.input_names = {name: _input_name(name, encoder) for name, encoder in encoders.items()}
        self.encoders = nn.ModuleDict(encoders)
        # What is saved must build the same towers offline, without the checkpoint that they may have come from.
        config.encoders = {name: encoder.spec for name, encoder in encoders.items()}
        config.text_config._attn_implementation = ATTENTION
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        width = config.text_config.hidden_size

        def connector(name: str) -> Connector:
            return build_connector(config.connectors[name], encoders[name].hidden_size, width, encoders[name].grid)

        self.connectors = nn.ModuleDict({name: connector(name) for name in config.connectors})
        # Last: one seed gives all other parts the same weights, whatever the strategy.
        self.fusion = build_fusion(config.fusion)
        self.fusion.check_layers(config.text_config.num_hidden_layers)
        self.fusion.build(DecoderShape.of(config.text_config), connector, tuple(config.connectors))
        self.fusion.start_from(dict(self.connectors.items()))
        # Each part was initialised by its own library; the flag keeps post_init from doing it again in its own way.
        for part in (self.encoders, self.connectors, self.fusion):
            mark_initialised(part)
        self.post_init()

    @classmethod
    def from_vlm(
        cls,
        vlm: str | PathLike[str] | PreTrainedModel,
        fusion: str | Mapping[str, Any] = "native",
        attention_backend: str = "auto",
        **loading: Any,
    ) -> AdoptedLM:
        """Adopt a Hugging Face vision-language model: its own tower, projector, decoder and head under our layer loop.

        Args:
            vlm: a folder or hub name, or a model. A model is copied and works on as before; a folder costs no copy.
            fusion: `native` computes what the model itself does; or a strategy by name or spec.
            attention_backend: a backend of `mmfuse.kernels.attend`.
            **loading: with a folder, what `from_pretrained` takes beside it, such as `dtype` or `quantization_config`.

        Returns:
            A model that takes what the model's own processor gives, in the mode (training or not) that it was in.

        Raises:
            ConfigError: an architecture that mmfuse does not know; the message says which it knows and how to add one.
        """
        from mmfuse.models.adopt import adopt

        return adopt(vlm, fusion, attention_backend, **loading)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Hugging Face's `from_pretrained`, for adopted models too."""
        from mmfuse.models.adopt import AdoptedConfig, AdoptedLM

        if cls is MultimodalLM and folder is not None and "config" not in kwargs:
            saved, _ = PreTrainedConfig.get_config_dict(folder, **kwargs)
            if saved.get("model_type") == AdoptedConfig.model_type:
                return AdoptedLM.from_pretrained(folder, *args, **kwargs)
        return super().from_pretrained(folder, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Called for what a checkpoint did not bring: parameters that are new, and buffers that are never saved."""
        if isinstance(module, Encoder):
            module.rebuild_buffers()
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def visual_tokens(self, modality: str = "image") -> int:
        """How many tokens of the decoder one medium becomes."""
        encoder, connector = cast(Encoder, self.encoders[modality]), cast(Connector, self.connectors[modality])
        return connector.num_tokens(encoder.num_tokens)

    def input_shape(self, modality: str = "image") -> tuple[int, ...]:
        """The shape of one medium's inputs, such as `(3, H, W)`."""
        return cast(Encoder, self.encoders[modality]).input_shape

    def parts(self) -> dict[str, nn.Module]:
        """The named parts whose parameters training freezes, tunes and counts apart."""
        return {
            "encoder": self.encoders,
            "connector": self.connectors,
            "decoder": self.decoder,
            "fusion": self.fusion,
        }

    def forward(
        self,
        input_ids: Tensor,
        tokens: TokenMap | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        eeg_features: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool = True,
        fusion: Fusion | None = None,
        record: Recorder | None = None,
        return_dict: bool = True,
    ) -> MultimodalOutput:
        """One pass over a batch.

        Of the media, only those that the model has an encoder for are taken, see `input_names`; each in the order in
        which its modality is read.

        Args:
            input_ids: `[B, S]`; media slots hold the placeholder id of their modality.
            tokens: what every token is; covers cached tokens too, `[B, cached + S]`. Without it all text is prompt
                and media are found by their placeholder ids.
            pixel_values: `[N, 3, H, W]`, images for a vision encoder.
            image_features: `[N, V, D]`, for images whose encoder is `precomputed`.
            audio_features: `[N, V, D]`, for audio whose encoder is `precomputed`.
            eeg_features: `[N, V, D]`, for EEG whose encoder is `precomputed`.
            labels: `[B, S]` target ids (not shifted), -100 where there is no loss.
            attention_mask: `[B, S]`, 0 on padding; only read when `tokens` is not given.
            past_key_values: keys and values of earlier calls.
            use_cache: return a cache (a new one if none was given).
            logits_to_keep: only the logits of the last so many tokens; 0 for all.
            return_logits: False saves the `[B, S, V]` logits when only the loss is wanted.
            fusion: a strategy without parameters to use in place of the model's own, as in an alignment stage.
            record: is given each layer's attention weights.
            return_dict: always True; Hugging Face's generation says so explicitly.

        Raises:
            ValueError: media that the model does not take, placeholders and features that disagree, labels that
                supervise what the fusion leaks, or a map that does not cover the tokens.
        """
        if not return_dict:
            raise ValueError("MultimodalLM returns a MultimodalOutput; return_dict=False is not supported")
        if tokens is None:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("with a filled cache, `tokens` must describe the cached tokens and the new ones")
            tokens = self.token_map(input_ids, attention_mask)
        media = self.media_inputs(
            {
                "pixel_values": pixel_values,
                "image_features": image_features,
                "audio_features": audio_features,
                "eeg_features": eeg_features,
            }
        )
        return self._decode(
            self._embed(input_ids, tokens.columns(len(tokens) - input_ids.shape[1]), media),
            tokens,
            fusion=fusion,
            labels=labels,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_logits=return_logits,
            record=record,
        )

    def _decode(
        self,
        embedded: Embedded,
        tokens: TokenMap,
        *,
        fusion: Fusion | None,
        labels: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        logits_to_keep: int,
        return_logits: bool,
        record: Recorder | None,
    ) -> MultimodalOutput:
        """The decoder over what was embedded; arguments as in `forward`."""
        strategy = self.fusion if fusion is None else fusion
        if labels is not None:
            strategy.check_labels(tokens, labels)
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache(strategy)
        hidden = run_decoder(
            self.decoder,
            embedded.embeds,
            tokens,
            strategy,
            features=embedded.features,
            arrange=embedded.arrange,
            cache=past_key_values,
            attention_backend=self.config.attention_backend,
            record=record,
        )
        loss = supervised = logits = None
        if labels is not None:
            loss, supervised = self._loss(hidden, tokens, labels)
        if return_logits:
            logits = self._logits(hidden[:, -logits_to_keep:])
        return MultimodalOutput(loss=loss, logits=logits, past_key_values=past_key_values, supervised=supervised)

    def new_cache(self, fusion: Fusion | None = None) -> DynamicCache:
        """An empty cache that `past_key_values` takes, for the model's own strategy or another."""
        return new_cache(self.fusion if fusion is None else fusion, self.config.text_config)

    def prepared(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of the model's processor with its `tokens`, as `forward` takes it."""
        return dict(batch)

    def token_map(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenMap:
        """A map of `input_ids [B, S]` by placeholder ids alone: one document a row, all text prompt, one turn."""
        live = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        modality = torch.zeros_like(input_ids)
        for name, token_id in self.config.media_token_ids.items():
            modality = modality.masked_fill(input_ids == token_id, Modality[name.upper()])
        return TokenMap.from_columns(modality * live, live > 0)

    def media_inputs(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The inputs that are there, by modality instead of keyword.

        Raises:
            ValueError: inputs that no encoder of the model takes.
        """
        found = {name: value for name, value in given.items() if value is not None}
        unused = sorted(found.keys() - self.input_names.values())
        if unused:
            taken = ", ".join(self.input_names.values()) or "text only"
            raise ValueError(f"the model takes {taken}; {', '.join(unused)} has no encoder here")
        return {modality: found[name] for modality, name in self.input_names.items() if name in found}

    def _embed(self, input_ids: Tensor, tokens: TokenMap, media: Mapping[str, Tensor]) -> Embedded:
        """Token embeddings with the media of each modality in their slots."""
        embeds = self.get_input_embeddings()(input_ids)
        found: dict[str, Tensor] = {}
        for name, module in self.encoders.items():
            encoder = cast(Encoder, module)
            inputs, slots = media.get(name), tokens.modality == Modality[name.upper()]
            if inputs is None and bool(slots.any()):
                raise ValueError(f"the batch has {int(slots.sum())} {name} tokens but no {name} inputs were given")
            if inputs is None and not self.training:
                continue
            # Every rank must run the same collectives, so a training batch without a medium still runs its encoder.
            features = encoder(embeds.new_zeros(1, *encoder.input_shape) if inputs is None else inputs)
            if encoder.precomputed:
                features = features.to(embeds.dtype)  # a tower casts to its own dtype, and here is none
            found[name] = features
            placed = self.connectors[name](features)
            if inputs is None:
                embeds = embeds + 0.0 * placed.sum()
                continue
            self._check_counts(name, slots, placed)
            embeds = embeds.masked_scatter(slots.unsqueeze(-1), placed.to(embeds.dtype))
        return Embedded(embeds, found)

    @staticmethod
    def _check_counts(name: str, slots: Tensor, features: Tensor) -> None:
        given, expected = features.shape[0] * features.shape[1], int(slots.sum())
        if given != expected:
            per_row = slots.sum(1).tolist()
            raise ValueError(
                f"{expected} {name} placeholders in the batch (by sample: {per_row}) but {given} features: "
                f"{features.shape[0]} inputs × {features.shape[1]} tokens"
            )

    def _loss(self, hidden: Tensor, tokens: TokenMap, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the supervised rows only, so that a large vocabulary never costs `[B, S, V]`."""
        rows, targets = supervised_rows(tokens.columns(len(tokens) - labels.shape[1]), labels, IGNORED_LABEL)
        logits = self._logits(hidden[rows])
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        count = targets.new_tensor(targets.numel())
        return total / count.clamp(min=1), count

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.decoder.lm_head(hidden)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _input_name(modality: str, encoder: Encoder) -> str:
    """The keyword of `modality`'s inputs, by whether its encoder takes features or pixels."""
    medium = MEDIA[modality]
    name = medium.features if encoder.precomputed else medium.raw
    if name is None:
        raise ConfigError(f"encoder {encoder.name!r} takes pixels; for {modality} there is `precomputed`")
    return name


def mark_initialised(module: nn.Module) -> None:
    """Keep transformers from initialising `module` again; on the meta device there is nothing to keep."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    for tensor in (*module.parameters(), *module.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
