"""What every encoder is, and what every vision encoder is: a headless tower, one layer of it, and some of its tokens.

Shape suffixes: N media, H and W pixels, T all tokens of the tower (CLS and registers first, then patches
in row-major order), V selected tokens, D features.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mmfuse.errors import ConfigError, unknown

Spec = dict[str, Any]
ImageSize = int | list[int] | tuple[int, int]
TOKENS = ("patches", "cls", "all")


@dataclass(frozen=True)
class Tower:
    """A tower whose last layer is the selected one, and the facts that an adapter knows about it."""

    module: nn.Module
    norm: nn.Module  # applied to the tower's tokens; identity below the last layer
    hidden_size: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    prefix_tokens: int  # CLS and register tokens in front of the patches
    has_cls: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


class Encoder(nn.Module):
    """A modality's inputs `[N, *input_shape]` to features `[N, V, D]`.

    Attributes:
        hidden_size: width D of the features.
        num_tokens: V, the number of tokens for one medium.
        grid: (rows, columns) in which the tokens lie; one row for a sequence. CLS and registers have no place in it.
        input_shape: of one medium, without the batch.
        spec: JSON that builds the same architecture again, offline and without `pretrained`. Store this one
            in a model config.
    """

    name: ClassVar[str]
    #: Whether the inputs are features already, of whatever modality, and not pixels.
    precomputed: ClassVar[bool] = False

    hidden_size: int
    num_tokens: int
    grid: tuple[int, int]
    input_shape: tuple[int, ...]
    spec: Spec

    def rebuild_buffers(self) -> None:
        """Compute anew what a checkpoint does not hold; called from the owning model's `_init_weights`."""


class VisionEncoder(Encoder):
    """Images to visual tokens.

    `layer` counts from the end: -1 is the last layer followed by the tower's final norm, on every token (what
    AKI takes of SigLIP); -2 is the output of the layer before it, without that norm (LLaVA, of CLIP).
    Layers above the selected one, pooling heads, projections and mask tokens are not part of the module, so
    every parameter that it has takes part in its output.

    An encoder whose parameters are all frozen runs without building a graph, unless the pixels themselves
    require a gradient, and `train()` leaves it in evaluation mode: a frozen tower has no dropout.

    Loading: `PreTrainedModel.from_pretrained` builds on the meta device and leaves non-persistent buffers
    uninitialised. The model that owns the encoder calls `rebuild_buffers()` from its `_init_weights`.

    Attributes:
        patch_size: (height, width) in pixels.
        image_size: (height, width) in pixels that `forward` takes.
        grid: (rows, columns) of patches.
        image_mean: per-channel mean that the tower's own recipe subtracts, for pixels in [0, 1].
        image_std: per-channel standard deviation likewise.
    """

    def __init__(self, tower: Tower, *, tokens: str, spec: Spec) -> None:
        super().__init__()
        if tokens not in TOKENS:
            raise ConfigError(unknown("tokens", tokens, TOKENS))
        if tokens == "cls" and not tower.has_cls:
            raise ConfigError("tokens='cls': this tower has no CLS token. Use 'patches'")
        self.hidden_size = tower.hidden_size
        self.patch_size = tower.patch_size
        self.image_size = tower.image_size
        self.grid = (tower.image_size[0] // tower.patch_size[0], tower.image_size[1] // tower.patch_size[1])
        self.image_mean = tower.image_mean
        self.image_std = tower.image_std
        self.input_shape = (3, *tower.image_size)
        self.tokens = tokens
        self.spec = {"type": self.name, **spec, "tokens": tokens}
        self.prefix_tokens = tower.prefix_tokens
        patches = self.grid[0] * self.grid[1]
        self.num_tokens = {"patches": patches, "cls": 1, "all": self.prefix_tokens + patches}[tokens]
        self.tower = tower.module
        self.norm = tower.norm
        _fixed_parameters_to_buffers(self)
        # transformers calls `_init_weights` on a module of a custom model only if some tensor that the module
        # itself holds was not loaded; without this one `rebuild_buffers` would never be reached.
        self.register_buffer("rebuilt", torch.ones(1), persistent=False)
        self._built_on_meta = any(parameter.is_meta for parameter in self.parameters())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode a batch of images.

        Args:
            pixel_values: `[N, 3, H, W]`, normalised, with (H, W) = `image_size`; cast to the tower's dtype.

        Returns:
            features `[N, V, D]` with V = `num_tokens`, D = `hidden_size`.

        Raises:
            ValueError: for another image size.
        """
        size = tuple(pixel_values.shape[-2:])
        if pixel_values.ndim != 4 or size != self.image_size:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, the encoder takes "
                f"[N, 3, {self.image_size[0]}, {self.image_size[1]}]; set `image_size` where it is built"
            )
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        trained = pixel_values.requires_grad or any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            features_NTD = self.norm(self.encode(pixel_values.to(dtype)))
        expected = self.prefix_tokens + self.grid[0] * self.grid[1]
        if features_NTD.shape[1] != expected:
            raise RuntimeError(f"the tower made {features_NTD.shape[1]} tokens, {expected} were expected")
        if self.tokens == "patches":
            return features_NTD[:, self.prefix_tokens :]
        return features_NTD[:, :1] if self.tokens == "cls" else features_NTD

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the tower: `[N, 3, H, W]` to `[N, T, D]` before the final norm."""
        raise NotImplementedError

    def rebuild_buffers(self) -> None:
        """Compute non-persistent buffers anew; call it from the owning model's `_init_weights`.

        What a checkpoint lacked gets the values of a freshly built tower too.
        """
        nn.init.ones_(self.get_buffer("rebuilt"))
        if self._built_on_meta:
            self._fill_missing()

    @torch.no_grad()
    def _fill_missing(self) -> None:
        saved = self.state_dict(keep_vars=True)
        missing = {name: value for name, value in saved.items() if not getattr(value, "_is_hf_initialized", False)}
        if not missing or any(value.is_meta for value in missing.values()):
            return
        arguments = {key: value for key, value in self.spec.items() if key != "type"}
        with torch.device("cpu"):
            fresh = type(self)(**arguments).state_dict()
        for name, value in missing.items():
            value.copy_(fresh[name])

    def train(self, mode: bool = True) -> VisionEncoder:
        super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))
        return self

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, tokens={self.tokens!r}, num_tokens={self.num_tokens}"


def keep_layers(layers: nn.ModuleList | nn.Sequential, layer: int) -> bool:
    """Drop the layers above `layer` (-1 is the last) in place; say whether all were kept.

    Raises:
        ConfigError: if there is no such layer.
    """
    count = len(layers)
    if not -count <= layer <= -1:
        raise ConfigError(f"layer={layer}: layers count from the end, -1 to -{count} in this tower")
    if layer < -1:
        del layers[count + layer + 1 :]
    return layer == -1


def pair(size: ImageSize) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    if isinstance(size, int):
        return size, size
    if len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ConfigError(f"size {size!r}: expected one integer or [height, width]")
    return size[0], size[1]


def channels(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    """Three numbers, one for each colour channel."""
    if len(values) != 3:
        raise ConfigError(f"image_{name} {list(values)}: expected 3 numbers, one for each colour channel")
    return values[0], values[1], values[2]


def check_image_size(wanted: ImageSize | None, native: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """The image size to use: `native`, or any other whose sides are positive multiples of the patch size.

    The native size is exempt because published towers break the rule (SigLIP so400m: patch 14 at 384).

    Raises:
        ConfigError: naming the nearest allowed size.
    """
    size = native if wanted is None else pair(wanted)
    if size == native:
        return size
    if any(side <= 0 or side % step for side, step in zip(size, patch, strict=True)):
        near = [max(step, round(side / step) * step) for side, step in zip(size, patch, strict=True)]
        raise ConfigError(
            f"image_size {list(size)} must be multiples of the patch size {list(patch)} "
            f"(or the tower's own {list(native)}); nearest: {near}"
        )
    return size


def unknown_model(kind: str, name: str, models: Iterable[str]) -> str:
    """Like `mmfuse.errors.unknown`, for libraries with too many names to list."""
    close = difflib.get_close_matches(name, list(models), n=3, cutoff=0.4)
    return f"unknown {kind} {name!r}" + (f": did you mean {', '.join(map(repr, close))}?" if close else "")


def building_on_meta() -> bool:
    """Whether tensors made now carry no data, so that loading weights would be in vain."""
    return torch.get_default_device().type == "meta"


def _fixed_parameters_to_buffers(root: nn.Module) -> None:
    """Turn parameters that the library itself never trains (sine tables) into persistent buffers.

    Otherwise whoever unfreezes the tower by `requires_grad_(True)` would train them.
    """
    for module in root.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
