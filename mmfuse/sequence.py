"""TokenMap: what every position of a batch is.

Fusion strategies, kernels, losses, evaluation and plots read positions from here and from nowhere else, so none of
them counts tokens before an image or looks for a token id. Shapes: `B` samples, `S` slots of a padded sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from mmfuse.errors import unknown

Side = Literal["right", "left"]


class Modality(IntEnum):
    """What a token carries. Video is IMAGE with a time coordinate in `TokenMap.grid`."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    EEG = 3


class Role(IntEnum):
    """Why a token is there: padding, something given to the model, or something it is taught to say."""

    PAD = 0
    PROMPT = 1
    ANSWER = 2


_PAD_VALUES = {
    "modality": Modality.TEXT,
    "role": Role.PAD,
    "segment": -1,
    "turn": -1,
    "document": -1,
    "position": 0,
    "grid": 0,
}


@dataclass(frozen=True, repr=False, eq=False)
class TokenMap:
    """Integer tensors `[B, S]` that describe every slot of a batch.

    Attributes:
        modality: `Modality` of the token.
        role: `Role` of the token; media are PROMPT.
        segment: which image, clip, recording or run of text the token belongs to; unique inside a row.
        turn: dialogue turn inside the document; a new turn begins after each run of answers.
        document: which packed sample the token belongs to.
        position: RoPE position; by default the order inside the document.
        grid: optional `[B, S, 3]` coordinates (t, y, x) of media tokens inside their medium, 0 for text. In decoders
            with three rotary axes (M-RoPE) a medium's tokens share one `position`, to which their grid is added.
    Padding slots hold role PAD and -1 for segment, turn and document.
    """

    modality: Tensor
    role: Tensor
    segment: Tensor
    turn: Tensor
    document: Tensor
    position: Tensor
    grid: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self._tensors():
            if value.shape[:2] != self.modality.shape or value.ndim != (3 if name == "grid" else 2):
                raise ValueError(
                    f"TokenMap.{name} has shape {tuple(value.shape)}, expected [B, S] = {tuple(self.modality.shape)}"
                )
            if value.is_floating_point() or value.dtype == torch.bool:
                raise TypeError(f"TokenMap.{name} must hold integers, got {value.dtype}")

    # Making one

    @classmethod
    def from_layout(cls, layout: Iterable[tuple[str, int]]) -> TokenMap:
        """One sample `[1, S]` from runs such as `[("text", 3), ("image", 5), ("text", 4), ("answer", 2)]`.

        `text` is PROMPT text, `answer` is ANSWER text, and any other name is a `Modality`. A new turn begins after
        each run of answers, and each run is a segment of its own.

        Raises:
            ValueError: an unknown kind of run, or a negative length.
        """
        columns: list[tuple[int, int, int, int]] = []
        turn, answered = 0, False
        for segment, (kind, length) in enumerate(layout):
            modality, role = _kind(kind)
            if length < 0:
                raise ValueError(f"run {segment} ({kind!r}) has length {length}, expected 0 or more")
            if answered and role != Role.ANSWER and length:
                turn, answered = turn + 1, False
            answered = answered or (role == Role.ANSWER and length > 0)
            columns += [(modality, role, segment, turn)] * length
        table = torch.tensor(columns, dtype=torch.long).reshape(-1, 4).T.unsqueeze(1)
        order = torch.arange(len(columns)).unsqueeze(0)
        return cls(table[0], table[1], table[2], table[3], torch.zeros_like(order), order)

    @classmethod
    def from_columns(
        cls,
        modality: Tensor,
        live: Tensor,
        *,
        answers: Tensor | None = None,
        lengths: Sequence[int] = (),
        position: Tensor | None = None,
        grid: Tensor | None = None,
    ) -> TokenMap:
        """A map of rows that hold one document each, from what a tokenizer's output tells.

        Args:
            modality: int `[B, S]`, a `Modality` each.
            live: bool `[B, S]`, False on padding.
            answers: bool `[B, S]`, where text is an answer; nowhere if not given.
            lengths: of the media of the batch in reading order; without them, adjacent media are one segment.
            position: rotary positions `[B, S]`; the order in the row if not given.
            grid: `[B, S, 3]`.
        """
        counted = live.long()
        is_answer = torch.zeros_like(live) if answers is None else answers & live & (modality == Modality.TEXT)
        starts = torch.zeros_like(live)
        starts[:, :1] = True
        for column in (modality, live, is_answer):
            starts[:, 1:] |= column[:, 1:] != column[:, :-1]
        if lengths:
            media = ((modality != Modality.TEXT) & live).nonzero()
            first = torch.tensor([0, *lengths[:-1]], device=media.device).cumsum(0)
            row, slot = media[first[first < len(media)]].T
            starts[row, slot] = True
        turns = torch.zeros_like(live)
        turns[:, 1:] = is_answer[:, :-1] & ~is_answer[:, 1:]
        return cls(
            modality=modality,
            role=counted * int(Role.PROMPT) + is_answer.long() * (int(Role.ANSWER) - int(Role.PROMPT)),
            segment=torch.where(live, (starts & live).cumsum(1) - 1, -1),
            turn=torch.where(live, (turns & live).cumsum(1), -1),
            document=counted - 1,
            position=(counted.cumsum(1) - 1) * counted if position is None else position,
            grid=grid,
        )

    @classmethod
    def batch(cls, samples: Sequence[TokenMap], side: Side = "right") -> TokenMap:
        """Stack maps `[b_i, S_i]` into `[sum b_i, max S_i]`, padded on `side`."""
        if not samples:
            raise ValueError("TokenMap.batch needs at least one sample")
        length = max(len(sample) for sample in samples)
        return _concatenate([sample.pad(length, side) for sample in samples], dim=0)

    @classmethod
    def pack(cls, samples: Sequence[TokenMap]) -> TokenMap:
        """Put single samples `[1, S_i]` behind each other in one row `[1, sum S_i]`, a document each.

        Positions are kept, so every document starts again at its own first position.
        """
        documents, segments, parts = 0, 0, []
        for sample in samples:
            if sample.modality.shape[0] != 1:
                raise ValueError(f"TokenMap.pack takes single samples [1, S], got {tuple(sample.modality.shape)}")
            live = sample.document >= 0
            parts.append(
                replace(
                    sample,
                    document=torch.where(live, sample.document + documents, sample.document),
                    segment=torch.where(live, sample.segment + segments, sample.segment),
                )
            )
            documents += int(sample.document.max()) + 1 if len(sample) else 0
            segments += int(sample.segment.max()) + 1 if len(sample) else 0
        if not parts:
            raise ValueError("TokenMap.pack needs at least one sample")
        return _concatenate(parts, dim=1)

    # Changing one

    def pad(self, length: int, side: Side = "right") -> TokenMap:
        """Pad every row to `length` slots on `side`."""
        if side not in ("right", "left"):
            raise ValueError(unknown("padding side", side, ("right", "left")))
        missing = length - len(self)
        if missing < 0:
            raise ValueError(f"cannot pad {len(self)} slots to {length}")
        if missing == 0:
            return self

        def widen(name: str, value: Tensor) -> Tensor:
            filler = value.new_full((value.shape[0], missing, *value.shape[2:]), int(_PAD_VALUES[name]))
            return torch.cat([value, filler] if side == "right" else [filler, value], dim=1)

        return self._map(widen)

    def gather(self, index: Tensor) -> TokenMap:
        """Slots `index [B, T]` of each row, in that order; an index of -1 gives padding. Positions are kept."""
        absent = index < 0
        safe = index.clamp(min=0)

        def take(name: str, value: Tensor) -> Tensor:
            wide = safe.reshape(*safe.shape, *[1] * (value.ndim - 2)).expand(*safe.shape, *value.shape[2:])
            gone = absent.reshape(*absent.shape, *[1] * (value.ndim - 2))
            return value.gather(1, wide).masked_fill(gone, int(_PAD_VALUES[name]))

        return self._map(take)

    def select(self, keep: Tensor) -> TokenMap:
        """Only the slots where `keep [B, S]` (bool) holds, moved together and padded on the right."""
        return self.gather(kept_index(keep))

    def expand(self, counts: dict[Modality, int]) -> TokenMap:
        """Replace every token of a modality in `counts` by that many tokens, and number the positions anew.

        Used on maps in which a medium is still one placeholder token.
        """
        rows = []
        for row in range(self.modality.shape[0]):
            repeats = torch.ones_like(self.modality[row])
            for modality, count in counts.items():
                repeats[self.modality[row] == modality] = count
            repeats[self.role[row] == Role.PAD] = 0
            wide = self.rows(row)._map(lambda _, value, n=repeats: value.repeat_interleave(n, dim=1))  # type: ignore[misc]
            rows.append(replace(wide, position=_order_in_document(wide.document)))
        return TokenMap.batch(rows)

    def append(self, count: int = 1, role: Role = Role.ANSWER) -> TokenMap:
        """Add `count` text tokens to each row, in the turn and document of the row's last live token."""
        slots = torch.arange(len(self), device=self.role.device)
        last = torch.where(self.role == Role.PAD, -1, slots).amax(dim=1, keepdim=True)
        if bool((last < 0).any()):
            raise ValueError("cannot append to a row that holds only padding")
        before = self.gather(last)
        continues = (before.modality == Modality.TEXT) & (before.role == int(role))
        new_turn = (before.role == Role.ANSWER) & (role != Role.ANSWER)
        steps = torch.arange(1, count + 1, device=self.role.device)
        added = TokenMap(
            modality=torch.full_like(before.modality, Modality.TEXT).expand(-1, count),
            role=torch.full_like(before.role, role).expand(-1, count),
            segment=torch.where(continues, before.segment, self.segment.amax(1, keepdim=True) + 1).expand(-1, count),
            turn=(before.turn + new_turn.long()).expand(-1, count),
            document=before.document.expand(-1, count),
            position=(before.position if before.grid is None else before.position + before.grid.amax(-1)) + steps,
            grid=None if before.grid is None else torch.zeros_like(before.grid).expand(-1, count, -1),
        )
        return _concatenate([self, added], dim=1)

    def followed_by(self, other: TokenMap) -> TokenMap:
        """These slots and those of `other` behind them, as they are: `[B, S + S']`."""
        return _concatenate([self, other], dim=1)

    def repeat(self, times: int) -> TokenMap:
        """Each row `times` times in place, as beam search orders its beams: `[B * times, S]`."""
        return self._map(lambda _, value: value.repeat_interleave(times, dim=0))

    def rows(self, start: int, stop: int | None = None) -> TokenMap:
        """Rows `start:stop` (one row if `stop` is None)."""
        stop = start + 1 if stop is None else stop
        return self._map(lambda _, value: value[start:stop])

    def columns(self, start: int, stop: int | None = None) -> TokenMap:
        """Slots `start:stop` of every row."""
        return self._map(lambda _, value: value[:, start:stop])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenMap:
        return self._map(lambda _, value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenMap:
        return self._map(lambda _, value: value.pin_memory())

    # Asking one

    @property
    def is_pad(self) -> Tensor:
        """bool `[B, S]`."""
        return self.role == Role.PAD

    @property
    def is_media(self) -> Tensor:
        """bool `[B, S]`: live tokens that are not text."""
        return (self.modality != Modality.TEXT) & ~self.is_pad

    @property
    def prompt_text(self) -> Tensor:
        """bool `[B, S]`: text that is given to the model, answer headers included."""
        return (self.modality == Modality.TEXT) & (self.role == Role.PROMPT)

    @property
    def is_answer(self) -> Tensor:
        """bool `[B, S]`: what the model is taught to say."""
        return self.role == Role.ANSWER

    @property
    def shape(self) -> torch.Size:
        return self.modality.shape

    @property
    def device(self) -> torch.device:
        return self.modality.device

    def __len__(self) -> int:
        """The number of slots `S`."""
        return int(self.modality.shape[1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenMap):
            return NotImplemented
        mine, theirs = dict(self._tensors()), dict(other._tensors())
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        batch, slots = self.shape
        lines = [self._describe(row) for row in range(min(batch, 4))]
        if batch > 4:
            lines.append(f"… {batch - 4} more rows")
        return f"TokenMap[B={batch}, S={slots}]\n  " + "\n  ".join(lines)

    def _describe(self, row: int) -> str:
        table = torch.stack([self.document[row], self.turn[row], self.segment[row], self.modality[row], self.role[row]])
        text, document = [], 0
        for key, run in groupby(map(tuple, table.T.tolist())):
            if key[0] > document:
                text.append("‖")
                document = key[0]
            kind = Modality(key[3]).name.lower() if key[3] != Modality.TEXT else _text_name(Role(key[4]))
            text.append(f"{kind}×{len(list(run))}")
        return " ".join(text)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in pairs if value is not None]

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> TokenMap:
        return TokenMap(**{name: change(name, value) for name, value in self._tensors()})


def kept_index(keep: Tensor, side: Side = "right") -> Tensor:
    """Slots where `keep [B, S]` holds, `[B, max kept]` in order, with -1 as padding on `side`."""
    width = int(keep.sum(dim=1).max()) if keep.numel() else 0
    if side == "right":
        order = torch.argsort(~keep, dim=1, stable=True)[:, :width]
    else:
        order = torch.argsort(keep.long(), dim=1, stable=True)[:, keep.shape[1] - width :]
    return order.masked_fill(~keep.gather(1, order), -1)


def order_among(keep: Tensor, document: Tensor) -> Tensor:
    """`[B, S]`: for how many earlier slots of its document `keep [B, S]` (bool) holds.

    A document is contiguous but for padding inside it, as where a prompt padded on the right is continued.
    """
    before = keep.cumsum(dim=1) - keep.long()
    slots = torch.arange(document.shape[1], device=document.device).expand_as(document)
    last_live = torch.where(document >= 0, slots, 0).cummax(dim=1).values
    current = document.gather(1, last_live)
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = current[:, 1:] != current[:, :-1]
    return before - torch.where(starts, before, 0).cummax(dim=1).values


def _kind(kind: str) -> tuple[int, int]:
    if kind == "text":
        return Modality.TEXT, Role.PROMPT
    if kind == "answer":
        return Modality.TEXT, Role.ANSWER
    media = {m.name.lower(): m for m in Modality if m != Modality.TEXT}
    if kind not in media:
        raise ValueError(unknown("kind of run", kind, ["text", "answer", *media]))
    return media[kind], Role.PROMPT


def _text_name(role: Role) -> str:
    return {Role.PAD: "pad", Role.PROMPT: "text", Role.ANSWER: "answer"}[role]


def _order_in_document(document: Tensor) -> Tensor:
    """`[B, S]` count of earlier live slots of the same document."""
    return torch.where(document >= 0, order_among(document >= 0, document), 0)


def _concatenate(maps: Sequence[TokenMap], dim: int) -> TokenMap:
    with_grid = [part for part in maps if part.grid is not None]
    if with_grid and len(with_grid) < len(maps):
        blank = with_grid[0].grid
        assert blank is not None
        maps = [part if part.grid is not None else replace(part, grid=blank.new_zeros(*part.shape, 3)) for part in maps]
    named = [dict(part._tensors()) for part in maps]
    return TokenMap(**{name: torch.cat([part[name] for part in named], dim=dim) for name in named[0]})
