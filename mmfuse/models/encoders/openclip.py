"""Visual towers of open_clip, taken before pooling and projection."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from mmfuse.errors import ConfigError, check_keys
from mmfuse.models.encoders.base import (
    Encoder,
    ImageSize,
    Tower,
    building_on_meta,
    check_image_size,
    keep_layers,
    pair,
    unknown_model,
)
from mmfuse.models.encoders.timm_vit import rebuild_timm_buffers, strip_timm_vit


class OpenCLIPEncoder(Encoder):
    """The visual tower of an open_clip model: its own VisionTransformer, or the timm model that it wraps.

    Args:
        model: a name that open_clip knows, or `local-dir:PATH`. Either this or `vision_cfg`.
        vision_cfg: fields of `open_clip.CLIPVisionCfg`.
        quick_gelu: for `vision_cfg`: OpenAI's approximation of GELU. A named model brings its own.
        pretrained: for `model`: a tag of open_clip, or a local checkpoint file. Only this argument can reach
            the network, and it is ignored on the meta device.
        image_size: pixels, one number or [height, width]; the model's own by default.
        layer: see `Encoder`.
        tokens: "patches", "cls" or "all".

    Raises:
        ConfigError: for an unknown model or field, a convolutional tower, or `layer=-1` of a tower that pools
            by attention before its final norm (CoCa), whose tokens therefore have none.
    """

    name = "open_clip"

    def __init__(
        self,
        model: str | None = None,
        vision_cfg: dict[str, Any] | None = None,
        quick_gelu: bool = False,
        pretrained: str | None = None,
        image_size: ImageSize | None = None,
        layer: int = -1,
        tokens: str = "patches",
    ) -> None:
        if (model is None) == (vision_cfg is None):
            raise ConfigError("an encoder of type 'open_clip' needs either `model` or `vision_cfg`")
        if pretrained is not None and model is None:
            raise ConfigError("`pretrained` needs the name of an open_clip `model`")
        arch = {"vision_cfg": vision_cfg, "quick_gelu": quick_gelu} if model is None else _named_config(model)
        visual = _visual(arch, image_size)
        if pretrained is not None and not building_on_meta():
            assert model is not None
            visual = _pretrained_visual(model, pretrained, _image_size(visual))
        trunk = getattr(visual, "trunk", None)
        tower = _strip(visual, layer) if trunk is None else strip_timm_vit(trunk, layer)
        spec = {
            "model": model,
            "vision_cfg": vision_cfg,
            "quick_gelu": quick_gelu,
            "image_size": list(tower.image_size),
            "layer": layer,
        }
        super().__init__(tower, tokens=tokens, spec=spec)
        self._wraps_timm = trunk is not None

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self._wraps_timm:
            hidden_NTD: torch.Tensor = self.tower.forward_features(pixel_values)  # type: ignore[operator]
            return hidden_NTD
        out = self.tower.forward_intermediates(  # type: ignore[operator]
            pixel_values, indices=1, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
        )
        return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)

    def rebuild_buffers(self) -> None:
        super().rebuild_buffers()
        rebuild_timm_buffers(self.tower)


def _named_config(model: str) -> dict[str, Any]:
    import open_clip  # slow to import, and not needed by users of other encoders

    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(unknown_model("open_clip model", model, open_clip.list_models()))
    return config


def _visual(arch: dict[str, Any], image_size: ImageSize | None) -> nn.Module:
    """Build the visual tower at random, at the image size asked for."""
    import open_clip

    fields = {field.name: field.default for field in dataclasses.fields(open_clip.CLIPVisionCfg)}
    check_keys("vision_cfg", arch["vision_cfg"], fields)
    config = {**fields, **arch["vision_cfg"], "timm_model_pretrained": False}
    if isinstance(config["layers"], (list, tuple)):
        raise ConfigError("this open_clip model has a convolutional tower; only vision transformers have tokens")
    if not config["timm_model_name"]:
        native, patch = pair(config["image_size"]), pair(config["patch_size"])
        config["image_size"] = check_image_size(image_size, native, patch)
    # The class offers no tower without its text side, so that one is made as small as it can be.
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(8, config, text, quick_gelu=arch.get("quick_gelu", False))
    visual: nn.Module = clip.visual
    if config["timm_model_name"]:
        embed: Any = visual.trunk.patch_embed  # type: ignore[union-attr]
        size = check_image_size(image_size, _image_size(visual), pair(embed.patch_size))
        if size != _image_size(visual):
            visual.set_input_size(size)  # type: ignore[operator]
    return visual


def _image_size(visual: nn.Module) -> tuple[int, int]:
    """What the tower takes; a wrapped timm model may disagree with the attribute of its wrapper."""
    trunk: Any = getattr(visual, "trunk", None)
    return pair(visual.image_size if trunk is None else trunk.patch_embed.img_size)  # type: ignore[arg-type]


def _pretrained_visual(model: str, pretrained: str, size: tuple[int, int]) -> nn.Module:
    import open_clip

    clip = open_clip.create_model(model, pretrained=pretrained, force_image_size=size)
    visual: nn.Module = clip.visual
    return visual


def _strip(visual: nn.Module, layer: int) -> Tower:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    pools_by_attention = visual.attn_pool is not None
    is_last = keep_layers(visual.transformer.resblocks, layer)  # type: ignore[union-attr, arg-type]
    if is_last and pools_by_attention:
        raise ConfigError(
            "layer=-1: this tower pools by attention before its final norm, so its tokens have none. Use layer=-2"
        )
    norm = visual.ln_post
    assert isinstance(norm, nn.Module)
    visual.ln_post = nn.Identity()
    visual.attn_pool = visual.attn_pool_contrastive = visual.proj = None  # type: ignore[assignment]
    recipe: dict[str, Any] = getattr(visual, "preprocess_cfg", {})  # set on towers with weights
    return Tower(
        module=visual,
        norm=norm if is_last else nn.Identity(),
        hidden_size=visual.conv1.out_channels,  # type: ignore[union-attr, arg-type]
        patch_size=pair(visual.patch_size),  # type: ignore[arg-type]
        image_size=pair(visual.image_size),  # type: ignore[arg-type]
        prefix_tokens=1,
        has_cls=True,
        image_mean=tuple(recipe.get("mean", OPENAI_DATASET_MEAN)),
        image_std=tuple(recipe.get("std", OPENAI_DATASET_STD)),
    )
