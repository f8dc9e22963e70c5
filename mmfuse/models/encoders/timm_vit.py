"""Vision transformers of timm: ViT, DeiT, EVA-02, BEiT, DINOv3, all that keep `blocks` over a patch grid."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmfuse.errors import ConfigError, check_keys
from mmfuse.models.encoders.base import (
    ImageSize,
    Tower,
    VisionEncoder,
    building_on_meta,
    check_image_size,
    keep_layers,
    pair,
    unknown_model,
)


class TimmEncoder(VisionEncoder):
    """A plain vision transformer of timm.

    The final norm at `layer=-1` is the model's `norm`, or its `fc_norm` for models that norm after average
    pooling (the same weights, applied to every token instead of their mean).

    Args:
        model: a name that timm knows.
        options: what to change in the architecture, for example `{"embed_dim": 64, "depth": 2}`.
        pretrained: True for timm's own weights, or a local .safetensors file. Only True can reach the
            network; either is ignored on the meta device.
        image_size: pixels, one number or [height, width]; the model's own by default.
        layer: see `VisionEncoder`.
        tokens: "patches", "cls" or "all".

    Raises:
        ConfigError: for an unknown model or option, or a model that is no plain vision transformer.
    """

    name = "timm"

    def __init__(
        self,
        model: str,
        options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        image_size: ImageSize | None = None,
        layer: int = -1,
        tokens: str = "patches",
    ) -> None:
        options = dict(options or {})
        with torch.device("meta"):
            outline = _create(model, {})
            _check_options(model, outline, options)
            if options:
                try:
                    outline = _create(model, options)
                except (AssertionError, TypeError, ValueError) as error:
                    raise ConfigError(
                        f"timm model {model!r} cannot be built with options {options}: {error}"
                    ) from error
        patch, native = grid_sizes(model, outline)
        size = check_image_size(image_size, native, patch)
        resized = {} if size == native else {"img_size": size}
        vit = _create(model, {**options, **resized, **_weights(pretrained)})
        spec = {"model": model, "options": options, "image_size": list(size), "layer": layer}
        super().__init__(strip_timm_vit(vit, layer), tokens=tokens, spec=spec)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_NTD: torch.Tensor = self.tower.forward_features(pixel_values)  # type: ignore[operator]
        return hidden_NTD

    def rebuild_buffers(self) -> None:
        super().rebuild_buffers()
        rebuild_timm_buffers(self.tower)


def strip_timm_vit(vit: nn.Module, layer: int) -> Tower:
    """Cut a timm vision transformer down to the selected layer, without head, pooling and final norm.

    Raises:
        ConfigError: if some non-persistent buffer could not be rebuilt after loading.
    """
    patch, size = grid_sizes(type(vit).__name__, vit)
    norm = vit.norm if not isinstance(vit.norm, nn.Identity) else getattr(vit, "fc_norm", nn.Identity())
    assert isinstance(norm, nn.Module) and isinstance(vit.blocks, (nn.ModuleList, nn.Sequential))
    is_last = keep_layers(vit.blocks, layer)
    vit.prune_intermediate_layers(indices=1, prune_norm=True, prune_head=True)  # type: ignore[operator]
    _check_rebuildable(vit)
    recipe: dict[str, Any] = vit.pretrained_cfg  # type: ignore[assignment]
    return Tower(
        module=vit,
        norm=norm if is_last else nn.Identity(),
        hidden_size=int(vit.embed_dim),  # type: ignore[arg-type]
        patch_size=patch,
        image_size=size,
        prefix_tokens=int(vit.num_prefix_tokens),  # type: ignore[arg-type]
        has_cls=getattr(vit, "cls_token", None) is not None,
        image_mean=tuple(recipe["mean"]),
        image_std=tuple(recipe["std"]),
    )


def rebuild_timm_buffers(vit: nn.Module) -> None:
    """Let every module of timm that computes non-persistent buffers compute them again."""
    for module in vit.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]


def _create(model: str, kwargs: dict[str, Any]) -> nn.Module:
    import timm  # slow to import, and not needed by users of other encoders

    if not timm.is_model(model):
        raise ConfigError(unknown_model("timm model", model, timm.list_models()))
    vit: nn.Module = timm.create_model(model, num_classes=0, **kwargs)
    return vit


def _weights(pretrained: bool | str) -> dict[str, Any]:
    if not pretrained or building_on_meta():
        return {}
    if pretrained is True:
        return {"pretrained": True}
    if not Path(pretrained).is_file() or not pretrained.endswith(".safetensors"):
        raise ConfigError(f"pretrained={pretrained!r}: expected true or an existing .safetensors file")
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": pretrained}}


def _check_options(model: str, outline: nn.Module, options: dict[str, Any]) -> None:
    """Options reach the model class; the ones that this adapter sets itself are not for the user."""
    classes = [cls for cls in type(outline).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    known = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    known -= {"self", "args", "kwargs", "img_size", "num_classes", "device", "dtype"}
    check_keys(f"options of timm model {model}", options, sorted(known))


def grid_sizes(model: str, vit: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """(patch size, image size) of a plain vision transformer."""
    needed = ("blocks", "norm", "num_prefix_tokens", "embed_dim", "prune_intermediate_layers")
    embed = getattr(vit, "patch_embed", None)
    if not all(hasattr(vit, name) for name in needed) or not hasattr(embed, "grid_size"):
        raise ConfigError(
            f"timm model {model!r} is no plain vision transformer (one patch grid, `blocks`, `norm`): "
            "hierarchical and convolutional models are not supported"
        )
    # Where a convolutional stem shrinks the image first, a patch of the grid covers more pixels than `patch_size`.
    return pair(embed.feat_ratio(as_scalar=False)), pair(embed.img_size)  # type: ignore[union-attr]


def _check_rebuildable(vit: nn.Module) -> None:
    for path, module in vit.named_modules():
        lost = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if lost and not hasattr(module, "init_non_persistent_buffers"):
            raise ConfigError(f"{type(vit).__name__} cannot rebuild {path}.{lost[0]} after loading")
