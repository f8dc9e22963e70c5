"""SAISA: every layer reads the image through a projector of its own, and image tokens do nothing else.

    columns: S system, I image, Q question, A answer
        S I I Q Q A
      S #
      I
      I
      Q # # # #
      Q # # # # #
      A # # # # # #

Paper: Yuan et al., SAISA, arXiv 2502.02458: in layer i the image slots hold `MLP_i(F)` of the encoder's features F; the
layer's own norm, k and v projections make keys and values of them (positions as ever), and only text issues queries
and passes the feed-forward network. It equals a causal decoder whose image slots are overwritten before each layer.

The projector of the first layer is the model's connector; each other layer has one of the same kind, which starts as a
copy of it. With the `mlp` connector these are the paper's "n separate 2-layer MLPs", as many as it counts. The paper's
first stage, one MLP shared by all layers, is `fusion: naavit` in that stage: the copies are taken when a stage begins
to tune `fusion`.

Deliberate differences from the official code, which cannot train: any number of media of any modality and width, an
image before all text, batches, packing and padding; any kind of connector, a resampler included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from mmfuse.fusion.base import CLASSES, TEXT_ROWS, Fusion, MediaPath, MediaSource, NewConnector, axis_of
from mmfuse.fusion.shape import DecoderShape
from mmfuse.kernels import Visibility
from mmfuse.sequence import TokenMap


class SAISA(Fusion):
    """Text reads media that each layer projects anew from the encoder's features."""

    media_path = MediaPath.KEYS

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        super().__init__(layers)
        #: `projectors[layer][modality]`; the first layer of the decoder uses the model's connectors.
        self.projectors = nn.ModuleDict()

    def build(self, shape: DecoderShape, new_connector: NewConnector, modalities: Sequence[str]) -> None:
        for layer in range(1, shape.layers):
            if self.changes(layer):
                self.projectors[str(layer)] = nn.ModuleDict({name: new_connector(name) for name in modalities})

    def start_from(self, connectors: Mapping[str, nn.Module]) -> None:
        for projectors in self.projectors.values():
            for name, projector in cast(nn.ModuleDict, projectors).items():
                projector.load_state_dict(connectors[name].state_dict())

    def visibility(self, tokens: TokenMap) -> Visibility:
        axis = axis_of(tokens)
        return Visibility(axis, axis, TEXT_ROWS, CLASSES)

    def media_state(self, layer: int, carried: Tensor, source: MediaSource) -> Tensor:
        if layer == 0:
            return carried
        projectors = cast(nn.ModuleDict, self.projectors[str(layer)])
        return source.through(lambda name, features: projectors[name](features).to(carried.dtype))
