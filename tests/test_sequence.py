"""TokenMap: every operation against plain Python lists, on random layouts."""

from __future__ import annotations

import re
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmfuse.sequence import Modality, Role, Side, TokenMap, kept_index

Layout = list[tuple[str, int]]
FIELDS = ("modality", "role", "segment", "turn", "document", "position")
PADDING = (Modality.TEXT, Role.PAD, -1, -1, -1, 0)

kinds = st.sampled_from(["text", "image", "audio", "eeg", "answer"])
layouts = st.lists(st.tuples(kinds, st.integers(0, 4)), min_size=1, max_size=5).filter(
    lambda runs: sum(n for _, n in runs)
)
batches = st.lists(layouts, min_size=1, max_size=3)
sides = st.sampled_from(["right", "left"])


def table(tokens: TokenMap) -> list[list[tuple[int, ...]]]:
    """A map as rows of tuples in the order of `FIELDS`."""
    columns = [getattr(tokens, name).tolist() for name in FIELDS]
    return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]


def live(tokens: TokenMap) -> list[list[tuple[int, ...]]]:
    return [[slot for slot in row if slot[1] != Role.PAD] for row in table(tokens)]


def batch_of(runs: list[Layout], side: Side = "right") -> TokenMap:
    return TokenMap.batch([TokenMap.from_layout(layout) for layout in runs], side=side)


# Making one


def test_from_layout_equals_a_table_written_by_hand() -> None:
    layout = [("text", 2), ("image", 2), ("text", 1), ("answer", 2), ("text", 1), ("audio", 1), ("answer", 1)]
    tokens = TokenMap.from_layout(layout)
    assert tokens.modality.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0, 2, 0]]
    assert tokens.role.tolist() == [[1, 1, 1, 1, 1, 2, 2, 1, 1, 2]]
    assert tokens.segment.tolist() == [[0, 0, 1, 1, 2, 3, 3, 4, 5, 6]]
    assert tokens.turn.tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, 1, 1]]
    assert tokens.document.tolist() == [[0] * 10]
    assert tokens.position.tolist() == [list(range(10))]
    assert tokens.is_media.tolist() == [[False, False, True, True, False, False, False, False, True, False]]
    assert tokens.prompt_text.tolist() == [[True, True, False, False, True, False, False, True, False, False]]
    assert tokens.is_answer.tolist() == [[False] * 5 + [True] * 2 + [False] * 2 + [True]]
    assert repr(tokens) == "TokenMap[B=1, S=10]\n  text×2 image×2 text×1 answer×2 text×1 audio×1 answer×1"


@given(layouts)
def test_from_layout_invariants(layout: Layout) -> None:
    (row,) = table(TokenMap.from_layout(layout))
    assert len(row) == sum(length for _, length in layout)
    kinds_of_row = ["answer" if r == Role.ANSWER else Modality(m).name.lower() for m, r, *_ in row]
    assert kinds_of_row == [kind for kind, length in layout for _ in range(length)]
    assert [slot[5] for slot in row] == list(range(len(row)))
    turn, before = 0, None
    for slot in row:
        turn += before == Role.ANSWER and slot[1] != Role.ANSWER
        before = slot[1]
        assert slot[3] == turn
    assert [len(list(run)) for _, run in groupby(row, key=lambda slot: slot[2])] == [n for _, n in layout if n]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([("text", 1), ("imge", 2)], "unknown kind of run 'imge': did you mean 'image'?"),
        ([("text", 1), ("image", -2)], "run 1 ('image') has length -2, expected 0 or more"),
    ],
)
def test_from_layout_refuses(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenMap.from_layout(layout)


def test_fields_are_checked() -> None:
    good = TokenMap.from_layout([("text", 3)])
    columns = {name: getattr(good, name) for name in FIELDS}
    with pytest.raises(ValueError, match=r"TokenMap.turn has shape \(1, 2\), expected \[B, S\] = \(1, 3\)"):
        TokenMap(**{**columns, "turn": good.turn[:, :2]})
    with pytest.raises(ValueError, match=r"TokenMap.grid has shape \(1, 3\)"):
        TokenMap(**columns, grid=good.turn)
    with pytest.raises(TypeError, match=r"TokenMap.role must hold integers, got torch.float32"):
        TokenMap(**{**columns, "role": good.role.float()})
    with pytest.raises(TypeError, match=r"TokenMap.role must hold integers, got torch.bool"):
        TokenMap(**{**columns, "role": good.role.bool()})


# Batches, packs, padding


@given(batches, sides)
def test_batch_holds_every_sample_and_padding(runs: list[Layout], side: Side) -> None:
    singles = [table(TokenMap.from_layout(layout))[0] for layout in runs]
    tokens = batch_of(runs, side)
    width = max(map(len, singles))
    assert tokens.shape == (len(runs), width)
    for row, single in zip(table(tokens), singles, strict=True):
        padding = [PADDING] * (width - len(single))
        assert row == (single + padding if side == "right" else padding + single)
    assert tokens.is_pad.tolist() == [[slot == PADDING for slot in row] for row in table(tokens)]
    assert not (tokens.is_pad & (tokens.is_media | tokens.prompt_text | tokens.is_answer)).any()
    assert (tokens.is_pad | tokens.is_media | tokens.prompt_text | tokens.is_answer).all()


@given(batches, sides, st.integers(0, 5))
def test_padding_adds_only_padding(runs: list[Layout], side: Side, extra: int) -> None:
    tokens = batch_of(runs)
    wide = tokens.pad(len(tokens) + extra, side)
    assert len(wide) == len(tokens) + extra
    assert live(wide) == live(tokens)
    start = 0 if side == "right" else extra
    assert wide.columns(start, start + len(tokens)) == tokens


def test_padding_refuses() -> None:
    tokens = TokenMap.from_layout([("text", 4)])
    with pytest.raises(ValueError, match="cannot pad 4 slots to 3"):
        tokens.pad(3)
    with pytest.raises(ValueError, match="unknown padding side 'rigth': did you mean 'right'"):
        tokens.pad(5, "rigth")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one sample"):
        TokenMap.batch([])
    with pytest.raises(ValueError, match="at least one sample"):
        TokenMap.pack([])
    with pytest.raises(ValueError, match=r"takes single samples \[1, S\], got \(2, 4\)"):
        TokenMap.pack([tokens.repeat(2)])


@given(batches)
def test_pack_numbers_documents_and_keeps_the_rest(runs: list[Layout]) -> None:
    singles = [table(TokenMap.from_layout(layout))[0] for layout in runs]
    (row,) = table(TokenMap.pack([TokenMap.from_layout(layout) for layout in runs]))
    assert [slot[4] for slot in row] == [i for i, single in enumerate(singles) for _ in single]
    for column in (0, 1, 3, 5):
        assert [slot[column] for slot in row] == [slot[column] for single in singles for slot in single]
    # Segments stay unique in the row, and the same tokens belong together as before.
    groups = [list(run) for _, run in groupby(row, key=lambda slot: slot[2])]
    assert [len(g) for g in groups] == [n for layout in runs for _, n in layout if n]
    assert len({group[0][2] for group in groups}) == len(groups)


@given(batches, layouts)
def test_packs_can_be_packed_again(runs: list[Layout], more: Layout) -> None:
    first, last = [TokenMap.from_layout(layout) for layout in runs], TokenMap.from_layout(more)
    twice, once = TokenMap.pack([TokenMap.pack(first).pad(60), last]), TokenMap.pack([*first, last])
    assert live(twice)[0] == live(once)[0]


def test_repr_separates_documents_and_names_padding() -> None:
    one, two = TokenMap.from_layout([("text", 2), ("answer", 1)]), TokenMap.from_layout([("image", 2)])
    assert repr(TokenMap.pack([one, two])) == "TokenMap[B=1, S=5]\n  text×2 answer×1 ‖ image×2"
    assert repr(TokenMap.batch([one, two], side="left")).endswith("text×2 answer×1\n  pad×1 image×2")
    assert repr(one.repeat(6)).endswith("… 2 more rows")


# Choosing and adding slots


@given(batches, sides, st.randoms(use_true_random=False))
def test_select_keeps_chosen_slots_in_order(runs: list[Layout], side: Side, random: object) -> None:
    tokens = batch_of(runs, side)
    keep = torch.tensor([[random.random() < 0.5 for _ in range(len(tokens))] for _ in runs])  # type: ignore[attr-defined]
    chosen = [
        [slot for slot, kept in zip(row, flags, strict=True) if kept]
        for row, flags in zip(table(tokens), keep.tolist(), strict=True)
    ]
    width = max(map(len, chosen))
    expected = [row + [PADDING] * (width - len(row)) for row in chosen]
    assert table(tokens.select(keep)) == expected
    index = kept_index(keep)
    assert [[i for i in row if i >= 0] for row in index.tolist()] == [
        [i for i, kept in enumerate(flags) if kept] for flags in keep.tolist()
    ]


@given(batches, st.data())
def test_gather_takes_slots_in_any_order(runs: list[Layout], data: st.DataObject) -> None:
    tokens = batch_of(runs)
    index = data.draw(
        st.lists(
            st.lists(st.integers(-1, len(tokens) - 1), min_size=3, max_size=3), min_size=len(runs), max_size=len(runs)
        )
    )
    expected = [[PADDING if i < 0 else row[i] for i in slots] for row, slots in zip(table(tokens), index, strict=True)]
    assert table(tokens.gather(torch.tensor(index))) == expected


@given(batches, sides, st.integers(1, 4))
def test_expand_equals_the_layout_with_longer_runs(runs: list[Layout], side: Side, count: int) -> None:
    placeholders = [
        [(kind, min(length, 1) if kind == "image" else length) for kind, length in layout] for layout in runs
    ]
    placeholders = [layout for layout in placeholders if sum(n for _, n in layout)]
    expanded = [
        [(kind, length * count if kind == "image" else length) for kind, length in layout] for layout in placeholders
    ]
    assert batch_of(placeholders, side).expand({Modality.IMAGE: count}) == batch_of(expanded)


def test_expand_keeps_the_documents_of_a_pack() -> None:
    layout = [("text", 1), ("image", 1), ("answer", 1)]
    packed = TokenMap.pack([TokenMap.from_layout(layout)] * 2)
    wide = TokenMap.from_layout([("text", 1), ("image", 3), ("answer", 1)])
    assert packed.expand({Modality.IMAGE: 3}) == TokenMap.pack([wide, wide])


@given(layouts, st.integers(1, 4))
def test_append_equals_a_longer_answer(layout: Layout, count: int) -> None:
    layout = [(kind, length) for kind, length in layout if length]
    kind, length = layout[-1]
    longer = [*layout[:-1], (kind, length + count)] if kind == "answer" else [*layout, ("answer", count)]
    assert TokenMap.from_layout(layout).append(count) == TokenMap.from_layout(longer)


@given(batches, sides, st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sampled_from([Role.ANSWER, Role.PROMPT]))
def test_appending_in_steps_equals_appending_at_once(
    runs: list[Layout], side: Side, steps: list[int], role: Role
) -> None:
    at_once = stepwise = batch_of(runs, side)
    for step in steps:
        stepwise = stepwise.append(step, role)
    assert stepwise == at_once.append(sum(steps), role)
    for before, after in zip(live(at_once), live(stepwise), strict=True):
        added = after[len(before) :]
        assert after[: len(before)] == before
        assert {slot[:2] for slot in added} == {(Modality.TEXT, role)}
        assert [slot[5] for slot in added] == [before[-1][5] + 1 + i for i in range(sum(steps))]
        answered = before[-1][1] == Role.ANSWER
        assert {slot[3] for slot in added} == {before[-1][3] + (answered and role == Role.PROMPT)}
        continues = before[-1][:2] == (Modality.TEXT, role)
        assert all((slot[2] == before[-1][2]) == continues for slot in added)
        assert len({slot[2] for slot in added}) == 1


def test_append_needs_a_live_token() -> None:
    tokens = TokenMap.from_layout([("text", 2)])
    empty = tokens.select(torch.zeros(1, 2, dtype=torch.bool)).pad(2)
    with pytest.raises(ValueError, match="row that holds only padding"):
        TokenMap.batch([tokens, empty]).append()


@given(batches, st.integers(1, 3))
def test_repeat_keeps_copies_together(runs: list[Layout], times: int) -> None:
    tokens = batch_of(runs)
    assert table(tokens.repeat(times)) == [row for row in table(tokens) for _ in range(times)]


def test_rows_and_columns() -> None:
    tokens = batch_of([[("text", 3)], [("image", 2)], [("answer", 1)]])
    assert table(tokens.rows(1)) == table(tokens)[1:2]
    assert table(tokens.rows(1, 3)) == table(tokens)[1:3]
    assert table(tokens.columns(1)) == [row[1:] for row in table(tokens)]
    assert tokens.rows(0) != tokens.rows(1)
    assert tokens != "a string"


# Grids


def with_grid(tokens: TokenMap) -> TokenMap:
    grid = torch.arange(tokens.modality.numel() * 3).reshape(*tokens.shape, 3)
    return TokenMap(**{name: getattr(tokens, name) for name in FIELDS}, grid=grid)


def grid_of(tokens: TokenMap) -> Tensor:
    assert tokens.grid is not None
    return tokens.grid


def test_every_operation_carries_the_grid() -> None:
    plain = TokenMap.from_layout([("text", 1), ("image", 2)])
    tokens = with_grid(plain)
    rows = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    zero = [0, 0, 0]
    assert grid_of(tokens.pad(4, "left")).tolist() == [[zero, *rows]]
    assert grid_of(tokens.gather(torch.tensor([[2, -1]]))).tolist() == [[rows[2], zero]]
    assert grid_of(tokens.append(2)).tolist() == [[*rows, zero, zero]]
    assert grid_of(tokens.repeat(2)).tolist() == [rows, rows]
    assert grid_of(TokenMap.batch([plain, tokens])).tolist() == [[zero] * 3, rows]
    assert grid_of(TokenMap.pack([tokens, plain])).tolist() == [[*rows, *[zero] * 3]]
    assert grid_of(tokens.to("cpu")).tolist() == [rows]
    assert tokens != plain


def test_a_map_cannot_be_hashed() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(TokenMap.from_layout([("text", 1)]))


def test_from_columns_tells_runs_apart() -> None:
    modality = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]])
    live = torch.ones(2, 9, dtype=torch.bool)
    live[0, 0], live[1, 6:] = False, False
    answers = torch.zeros(2, 9, dtype=torch.bool)
    answers[0, 6:8], answers[1, 2:5] = True, True  # that of a medium is none
    tokens = TokenMap.from_columns(modality, live, answers=answers, lengths=[2, 2, 2])
    assert tokens.segment.tolist() == [[-1, 0, 1, 1, 2, 2, 3, 3, 4], [0, 1, 1, 2, 2, 3, -1, -1, -1]]
    assert tokens.turn.tolist() == [[-1, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, -1, -1, -1]]
    assert tokens.position.tolist() == [[0, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 0, 0, 0]]
    assert tokens.document.tolist() == [[-1] + [0] * 8, [0] * 6 + [-1] * 3]
    assert tokens.is_answer.sum(1).tolist() == [2, 2]
    joined = TokenMap.from_columns(modality, live)
    assert joined.segment[0].tolist() == [-1, 0, 1, 1, 1, 1, 2, 2, 2]


def test_what_is_appended_stands_behind_a_mediums_grid() -> None:
    grid = torch.zeros(1, 4, 3, dtype=torch.long)
    grid[0, 2:] = torch.tensor([[0, 0, 1], [0, 2, 1]])
    modality, live = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    tokens = TokenMap.from_columns(modality, live, position=torch.tensor([[0, 1, 2, 2]]), grid=grid).append(2)
    assert tokens.position.tolist() == [[0, 1, 2, 2, 5, 6]]
    assert tokens.grid is not None
    assert not tokens.grid[0, 4:].any()
