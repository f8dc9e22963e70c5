"""A batch of a chosen shape for a model's decoder, without an encoder in front of it.

Shapes: `B` samples, `S` tokens, `D` hidden size, `V` tokens of one medium, `De` width of an encoder's features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache

from mmfuse.errors import ConfigError
from mmfuse.kernels import attend
from mmfuse.models import MultimodalLM
from mmfuse.models.attention import AttentionFunction
from mmfuse.models.decoder import run_decoder
from mmfuse.models.encoders import Encoder
from mmfuse.sequence import TokenMap


@dataclass(frozen=True)
class Workload:
    """What a decoder is given in one call; its numbers mean nothing.

    Attributes:
        tokens: what all tokens are, cached ones first.
        embeds: `[B, S, D]`, the new ones.
        features: by modality `[N, V, De]`, what an encoder would have given for the new media.
    """

    tokens: TokenMap
    embeds: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def random(cls, model: MultimodalLM, tokens: TokenMap) -> Workload:
        """All tokens of a map are new. In the model's dtype, on its device."""
        samples, visual = tokens.shape[0], int(tokens.is_media[0].sum())
        features = {}
        name = medium(model)
        if name in model.encoders and visual:
            encoder, each = cast(Encoder, model.encoders[name]), model.visual_tokens(name)
            # A connector that takes tokens one by one takes any number of them; others need whole media.
            whole = (
                (samples, visual) if each == encoder.num_tokens else (samples * -(-visual // each), encoder.num_tokens)
            )
            features[name] = _random(model, *whole, encoder.hidden_size)
        return cls(tokens, random_embeds(model, *tokens.shape), features)

    def run(self, model: MultimodalLM, cache: Cache | None = None, attention: AttentionFunction = attend) -> Tensor:
        """Hidden states `[B, S, D]` of the model's decoder under its own fusion; see `run_decoder`."""
        return run_decoder(
            model.decoder,
            self.embeds,
            self.tokens,
            model.fusion,
            features=self.features,
            cache=cache,
            attention_backend=model.config.attention_backend,
            attention=attention,
        )


def workload_tokens(model: MultimodalLM, text: int, visual: int, batch: int = 1) -> TokenMap:
    """`[batch, text + visual]`: one text token, the media, the rest of the text; all of it prompt.

    Args:
        model: says of which modality the media are.
        text: text tokens of a sample, at least 1.
        visual: media tokens of a sample, whatever the encoder gives for one medium.
        batch: samples.

    Raises:
        ConfigError: no text, no samples, or a negative number of media tokens.
    """
    for name, count, least in (("text tokens", text, 1), ("visual tokens", visual, 0), ("samples", batch, 1)):
        if count < least:
            raise ConfigError(f"a workload needs at least {least} {name}, got {count}")
    return TokenMap.from_layout([("text", 1), (medium(model), visual), ("text", text - 1)]).repeat(batch)


def medium(model: MultimodalLM) -> str:
    """The modality that media tokens get: images, or the first one that a model without images takes."""
    return "image" if "image" in model.encoders or not model.encoders else next(iter(model.encoders))


def random_embeds(model: MultimodalLM, batch: int, length: int) -> Tensor:
    """`[batch, length, D]`."""
    return _random(model, batch, length, model.config.text_config.hidden_size)


def copy_with(model: MultimodalLM, make: Callable[[Tensor], Tensor]) -> MultimodalLM:
    """A copy of a model whose parameters and buffers are what `make` makes of them; they are not copied themselves.

    Adapters, tied weights and `requires_grad` are as in the original.
    """
    # What `deepcopy` finds here it takes for copied already.
    memo: dict[int, Any] = {id(buffer): make(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _random(model: MultimodalLM, *shape: int) -> Tensor:
    weight = cast(nn.Embedding, model.get_input_embeddings()).weight
    return weight.detach().new_empty(shape).normal_()
