"""Modular duplex attention (MODA): keys of each modality are aligned with the other one's basis before attention.

    columns: S system, I image, Q question, A answer; ~ marks keys that are aligned
        S~I~I~Q~Q~A
      S #
      I # #
      I # # #
      Q # # # #
      Q # # # # #
      A # # # # # #

Paper: Zhang et al., MODA, arXiv 2507.04635. In each layer, for a modality m and the other m' (eq. 5 and 6):

    G^m = norm(K̂^mᵀ V^m)                      a basis [Dh, Dh] for each head; rows of K̂ and of G have length 1
    K^m' ← fuse(K^m', K̂^m' G^m)               media by the basis of text, text by that of media

`fuse` is `W(K + r ⊙ aligned)` or `W[K; aligned]`; it starts as the identity. The modular mask (eq. 9 and 10, after
StableMask, arXiv 2402.04779) scores every masked key j ahead with -(j-1)β and masks it again behind the softmax, which
adds `exp(-iβ) / (1 - exp(-β))` to the denominator of row i. β may differ for rows whose future is their own modality
(text) and the other (media), since what is still to come is text.

The defaults are what is sound; `OFFICIAL` is what the official code does:

- The basis of text is that of the prompt text of the medium's own turn. The official code takes all text, later
  answers included, so labels leak into the logits in front of them: `text_scope="all"`.
- Both directions of the paper. The code aligns media alone: `directions=("media",)`. Only prompt text is aligned, and
  only by media of its own turn, so an answer is decoded as it was trained.
- Aligned keys enter the cache, for any number of key heads. The code's are lost under grouped-query attention, unless
  there is one key head.
- The pseudo-scores go on behind the end of the sequence, so that a row does not depend on how long its batch is; the
  code has no such mask: `decay_self=None, decay_cross=None`. The paper does not state β.
- The paper's basis is `K̂ᵀK̂` (`gram="kk"`), the code's `K̂ᵀV` (`gram="kv"`). The paper's best fuser is `concat`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfuse.errors import ConfigError, unknown
from mmfuse.fusion.base import Fusion, NewConnector
from mmfuse.fusion.flops import moda_flops
from mmfuse.fusion.shape import DecoderShape
from mmfuse.sequence import TokenMap, order_among

Gram = Literal["kv", "kk"]
Fuse = Literal["gated_add", "concat"]
TextScope = Literal["prompt", "all"]

#: The settings under which the strategy does what the official code does. Training with them leaks the answers.
OFFICIAL = MappingProxyType[str, Any](
    {"gram": "kv", "directions": ("media",), "text_scope": "all", "decay_self": None, "decay_cross": None}
)


class ModularDuplexAttention(Fusion):
    """Causal attention over keys that are aligned between modalities, with mass for what is masked.

    Args:
        layers: see `Fusion`.
        gram: of what a basis is made, keys and values or keys alone.
        directions: whose keys are aligned, `"media"`, `"text"` or both.
        fuse: how aligned keys meet the original ones.
        text_scope: which text makes a basis; `"all"` leaks answers and is there to compare with the official code.
        decay_self: β of text rows; None for no mass.
        decay_cross: β of media rows; None for no mass.

    Raises:
        ConfigError: an unknown setting, or a decay that is not positive.
    """

    # Media see, through their keys, the text of their turn that comes after them.
    shows_future = True
    adjusts_keys = True

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        gram: Gram = "kv",
        directions: Sequence[str] = ("media", "text"),
        fuse: Fuse = "gated_add",
        text_scope: TextScope = "prompt",
        decay_self: float | None = 1.0,
        decay_cross: float | None = 1.0,
    ) -> None:
        super().__init__(layers)
        for name, values, known in (
            ("gram", [gram], get_args(Gram)),
            ("fuse", [fuse], get_args(Fuse)),
            ("text_scope", [text_scope], get_args(TextScope)),
            ("direction", directions, ("media", "text")),
        ):
            for value in values:
                if value not in known:
                    raise ConfigError(unknown(f"{name} of moda", value, known))
        if any(decay is not None and not decay > 0 for decay in (decay_self, decay_cross)):
            raise ConfigError(f"moda: decays must be positive, got {decay_self} and {decay_cross}")
        self.gram, self.fuse, self.text_scope = gram, fuse, text_scope
        self.directions = tuple(directions)
        self.decays = (decay_self, decay_cross)
        self.fusers = nn.ModuleDict()

    def build(self, shape: DecoderShape, new_connector: NewConnector, modalities: Sequence[str]) -> None:
        for layer in range(shape.layers):
            if self.changes(layer):
                fusers = {way: KeyFuser(shape.head_dim, self.fuse) for way in self.directions}
                self.fusers[str(layer)] = nn.ModuleDict(fusers)

    def layer_flops(self, shape: DecoderShape, text: int, visual: int) -> int:
        return moda_flops(shape, text, visual, directions=self.directions, concat=self.fuse == "concat")

    def adjust_keys(self, layer: int, k: Tensor, v: Tensor, tokens: TokenMap) -> Tensor:
        fusers = cast(nn.ModuleDict, self.fusers[str(layer)])
        media, prompt = tokens.is_media, tokens.prompt_text
        text = prompt if self.text_scope == "prompt" else ~media & ~tokens.is_pad
        unit = _unit_rows(k)
        second = v if self.gram == "kv" else unit
        groups = self._groups(tokens)
        # A training batch without media still uses every fuser, so that ranks do not diverge.
        adjusted = k
        for fuser in fusers.values() if self.training and not groups else ():
            adjusted = adjusted + 0.0 * fuser(k, k).sum()
        for group in groups:
            for way, rows, others in (("media", media & group, text & group), ("text", prompt & group, media & group)):
                if way not in fusers:
                    continue
                # Without the other modality there is no basis, and nothing is changed.
                rows = rows & others.any(1, keepdim=True)
                aligned = unit @ basis(unit, second, others)
                adjusted = torch.where(rows[:, None, :, None], fusers[way](k, aligned), adjusted)
        return adjusted

    def _groups(self, tokens: TokenMap) -> list[Tensor]:
        """bool `[B, S]` for each place in which text and media are aligned: a turn, or with all text a document."""
        if not bool(tokens.is_media.any()):
            return []
        code = tokens.document
        if self.text_scope == "prompt":
            code = code * (tokens.turn.max() + 1) + tokens.turn
        return [(code == place) & ~tokens.is_pad for place in code[tokens.is_media].unique()]

    def softmax_mass(self, tokens: TokenMap) -> Tensor | None:
        if self.decays == (None, None):
            return None
        order = order_among(~tokens.is_pad, tokens.document).float()
        text, media = (_log_mass(order, decay) for decay in self.decays)
        return torch.where(tokens.is_media, media, text)

    def stale_rows(self, tokens: TokenMap, cached: int) -> Tensor:
        if self.text_scope == "all":
            return torch.zeros(len(tokens.document), dtype=torch.bool, device=tokens.device)
        early = torch.arange(len(tokens), device=tokens.device) < cached
        stale = torch.zeros(len(tokens.document), dtype=torch.bool, device=tokens.device)
        for group in self._groups(tokens):
            prompt = group & ~tokens.is_answer
            stale |= group.logical_and(tokens.is_media).any(1) & (prompt & early).any(1) & (prompt & ~early).any(1)
        return stale


class KeyFuser(nn.Module):
    """Meets keys with their aligned form; shared by all heads; the identity on the keys at first.

    Args:
        head_dim: width of a head, `Dh`.
        fuse: `gated_add`: `W(K + r ⊙ aligned)`. `concat`: `W[K; aligned]`.
    """

    def __init__(self, head_dim: int, fuse: Fuse) -> None:
        super().__init__()
        gated = fuse == "gated_add"
        self.ratio = nn.Parameter(torch.zeros(head_dim)) if gated else None
        self.weight = nn.Parameter(torch.empty(head_dim, head_dim if gated else 2 * head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity on the keys, nothing of the aligned ones."""
        nn.init.eye_(self.weight)
        if self.ratio is not None:
            nn.init.zeros_(self.ratio)

    def forward(self, keys: Tensor, aligned: Tensor) -> Tensor:
        """Keys of the shape of both arguments, `[B, Hkv, S, Dh]`."""
        if self.ratio is not None:
            return F.linear(keys + self.ratio * aligned, self.weight)
        return F.linear(torch.cat([keys, aligned], dim=-1), self.weight)


def basis(unit: Tensor, second: Tensor, members: Tensor) -> Tensor:
    """`[B, Hkv, Dh, Dh]`: `K̂ᵀV` over `members [B, S]`, each row of length 1; 0 where there are none."""
    held = unit * members[:, None, :, None]
    return F.normalize(held.transpose(-1, -2) @ second, dim=-1)


def _unit_rows(k: Tensor) -> Tensor:
    shifted = k + 1e-6
    return shifted / shifted.norm(dim=-1, keepdim=True)


def _log_mass(order: Tensor, decay: float | None) -> Tensor:
    """Logarithm of the sum over all j > i of `exp(-(j - 1) β)`, with `i = order + 1` counted from 1 as in the paper."""
    if decay is None:
        return torch.full_like(order, -torch.inf)
    return -(order + 1) * decay - math.log(-math.expm1(-decay))
