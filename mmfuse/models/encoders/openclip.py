"""Visual towers of open_clip, taken before pooling and projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmfuse.errors import ConfigError, check_keys
from mmfuse.models.encoders.base import (
    ImageSize,
    Tower,
    VisionEncoder,
    building_on_meta,
    channels,
    check_image_size,
    keep_layers,
    pair,
    unknown_model,
)
from mmfuse.models.encoders.timm_vit import grid_sizes, rebuild_timm_buffers, strip_timm_vit

_SCHEMES = ("local-dir:", "hf-hub:")


class OpenCLIPEncoder(VisionEncoder):
    """The visual tower of an open_clip model: its own VisionTransformer, or the timm model that it wraps.

    The architecture comes from exactly one place: `model`, `vision_cfg`, or a `pretrained` that names a folder or
    a repository in open_clip's own format.

    Args:
        model: a name that open_clip has built in. It brings its own activation.
        vision_cfg: fields of `open_clip.CLIPVisionCfg`.
        quick_gelu: for `vision_cfg`: OpenAI's approximation of GELU.
        pretrained: with `model`, a tag of open_clip or a local checkpoint file; without, `local-dir:PATH` or
            `hf-hub:NAME`. Only this argument can reach the network. No weights are loaded on the meta device.
        image_size: pixels, one number or [height, width]; the model's own by default.
        layer: see `VisionEncoder`.
        tokens: "patches", "cls" or "all".
        image_mean: per-channel mean; by default that of the weights, or else of the architecture.
        image_std: per-channel standard deviation likewise.

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
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if model is None and vision_cfg is None and pretrained is not None and pretrained.startswith(_SCHEMES):
            arch = _named_config(pretrained)
            vision_cfg, quick_gelu = arch["vision_cfg"], arch.get("quick_gelu", False)
        else:
            arch = _architecture(model, vision_cfg, quick_gelu, pretrained)
        if image_size is None and vision_cfg is not None:
            # open_clip itself does not hand this field to the timm model that it wraps.
            image_size = vision_cfg.get("image_size")
        visual = _visual(arch, image_size)
        if pretrained is not None and not building_on_meta():
            visual = _pretrained_visual(model, pretrained, _image_size(visual))
        trunk = getattr(visual, "trunk", None)
        tower = _strip(visual, layer) if trunk is None else strip_timm_vit(trunk, layer)
        recipe: dict[str, Any] = getattr(visual, "preprocess_cfg", {})  # set on towers with weights
        mean, std = (
            channels(name, given or recipe.get(name) or default)
            for name, given, default in (("mean", image_mean, tower.image_mean), ("std", image_std, tower.image_std))
        )
        spec = {
            "model": model,
            "vision_cfg": vision_cfg,
            "quick_gelu": quick_gelu,
            "image_size": list(tower.image_size),
            "layer": layer,
            "image_mean": list(mean),
            "image_std": list(std),
        }
        tower = dataclasses.replace(tower, image_mean=mean, image_std=std)
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


def _architecture(
    model: str | None, vision_cfg: dict[str, Any] | None, quick_gelu: bool, pretrained: str | None
) -> dict[str, Any]:
    if (model is None) == (vision_cfg is None):
        raise ConfigError(
            "an encoder of type 'open_clip' needs either `model` or `vision_cfg`, or `pretrained` alone with "
            f"{' or '.join(_SCHEMES)} in front"
        )
    if vision_cfg is not None:
        if pretrained is not None:
            raise ConfigError("`pretrained` needs the name of an open_clip `model` beside it, not a `vision_cfg`")
        return {"vision_cfg": vision_cfg, "quick_gelu": quick_gelu}
    assert model is not None
    if model.startswith(_SCHEMES):
        raise ConfigError(f"model={model!r}: give it as `pretrained`, and no `model`")
    if quick_gelu:
        raise ConfigError(f"`quick_gelu` belongs to `vision_cfg`; {model} brings its own activation")
    return _named_config(model)


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
        patch, native = grid_sizes(config["timm_model_name"], _trunk(visual))
        _resize(visual, check_image_size(image_size, native, patch))
    return visual


def _trunk(visual: nn.Module) -> nn.Module:
    trunk = visual.trunk
    assert isinstance(trunk, nn.Module)
    return trunk


def _resize(visual: nn.Module, size: tuple[int, int]) -> None:
    if size != _image_size(visual):
        visual.set_input_size(size)  # type: ignore[operator]
    if size != _image_size(visual):
        raise ConfigError(f"{type(visual.trunk).__name__} takes images of {list(_image_size(visual))} only")


def _image_size(visual: nn.Module) -> tuple[int, int]:
    """What the tower takes; a wrapped timm model may disagree with the attribute of its wrapper."""
    if not hasattr(visual, "trunk"):
        return pair(visual.image_size)  # type: ignore[arg-type]
    return grid_sizes(type(visual.trunk).__name__, _trunk(visual))[1]


def _pretrained_visual(model: str | None, pretrained: str, size: tuple[int, int]) -> nn.Module:
    import open_clip

    name, tag = (pretrained, None) if model is None else (model, pretrained)
    clip = open_clip.create_model(name, pretrained=tag, force_image_size=size, require_pretrained=True)
    visual: nn.Module = clip.visual
    if hasattr(visual, "trunk"):
        _resize(visual, size)
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
    return Tower(
        module=visual,
        norm=norm if is_last else nn.Identity(),
        hidden_size=visual.conv1.out_channels,  # type: ignore[union-attr, arg-type]
        patch_size=pair(visual.patch_size),  # type: ignore[arg-type]
        image_size=pair(visual.image_size),  # type: ignore[arg-type]
        prefix_tokens=1,
        has_cls=True,
        image_mean=OPENAI_DATASET_MEAN,
        image_std=OPENAI_DATASET_STD,
    )
