"""Visibility: its dense mask against the definition written as a loop over pairs, on random maps and rules."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmfuse.fusion import ModalityMutual
from mmfuse.fusion.base import base_visibility
from mmfuse.kernels import Axis, Condition, Rules, Visibility
from mmfuse.sequence import TokenMap

NAMES = ("alpha", "beta", "gamma")
Token = dict[str, int]

conditions = st.lists(st.sampled_from(list(Condition)), max_size=3).map(
    lambda some: Condition(sum({int(c) for c in some}))
)
rule_tables = st.dictionaries(
    st.sampled_from(list(product(range(3), repeat=2))), st.lists(conditions, min_size=1, max_size=2), max_size=9
)
windows = st.one_of(st.none(), st.integers(1, 6))


def draw_tokens(data: st.DataObject, batch: int, count: int) -> list[list[Token]]:
    token = st.fixed_dictionaries(
        {
            "document": st.integers(-1, 1),
            "rank": st.integers(0, 4),
            "segment": st.integers(-1, 2),
            "turn": st.integers(-1, 2),
            "cls": st.integers(0, 2),
            "ref": st.integers(-1, 2),
            **dict.fromkeys(("y", "x", "top", "bottom", "left", "right"), st.integers(0, 2)),
        }
    )
    rows = data.draw(st.lists(st.lists(token, min_size=count, max_size=count), min_size=batch, max_size=batch))
    return [[{**slot, "slot": i} for i, slot in enumerate(row)] for row in rows]


def axis(rows: list[list[Token]]) -> Axis:
    return Axis(**{name: torch.tensor([[slot[name] for slot in row] for row in rows]) for name in rows[0][0]})


def holds(condition: Condition, query: Token, key: Token) -> bool:
    wanted = {
        Condition.CAUSAL: query["rank"] >= key["rank"],
        Condition.SELF: query["slot"] == key["slot"],
        Condition.SAME_SEGMENT: query["segment"] == key["segment"],
        Condition.SAME_TURN: query["turn"] == key["turn"],
        Condition.REF_SEGMENT: query["ref"] == key["segment"],
        Condition.WINDOW_2D: query["top"] <= key["y"] <= query["bottom"]
        and query["left"] <= key["x"] <= query["right"],
    }
    return all(wanted[single] for single in condition)


def sees(query: Token, key: Token, rules: Rules, window: int | None) -> bool:
    """The definition."""
    if query["document"] < 0 or query["document"] != key["document"]:
        return False
    if window is not None and abs(query["slot"] - key["slot"]) >= window:
        return False
    return any(holds(condition, query, key) for condition in rules.get((query["cls"], key["cls"]), ()))


def table(
    queries: list[list[Token]], keys: list[list[Token]], rules: Rules, window: int | None
) -> list[list[list[bool]]]:
    return [[[sees(q, k, rules, window) for k in ks] for q in qs] for qs, ks in zip(queries, keys, strict=True)]


@given(st.data(), rule_tables, windows)
def test_dense_is_the_definition(data: st.DataObject, rules: Rules, window: int | None) -> None:
    queries, keys = draw_tokens(data, 2, 4), draw_tokens(data, 2, 5)
    visibility = Visibility(axis(queries), axis(keys), rules, NAMES, window)
    expected = table(queries, keys, rules, window)
    assert visibility.shape == (2, 4, 5)
    assert visibility.dense().tolist() == expected
    assert visibility.dead_rows().tolist() == [[not any(row) for row in sample] for sample in expected]


@given(st.data(), rule_tables, windows, windows)
def test_views_are_parts_of_the_whole(
    data: st.DataObject, rules: Rules, window: int | None, narrower: int | None
) -> None:
    tokens = draw_tokens(data, 2, 6)
    visibility = Visibility(axis(tokens), axis(tokens), rules, NAMES, window)
    start, kept = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 6))
    queries, keys = [row[start:] for row in tokens], [row[6 - kept :] for row in tokens]
    if start < 6:
        assert visibility.rows(start).dense().tolist() == table(queries, tokens, rules, window)
        both = visibility.rows(start).view(window=narrower, keys=kept)
        assert both.dense().tolist() == table(queries, keys, rules, narrower)
    assert visibility.view(window=narrower, keys=kept).dense().tolist() == table(tokens, keys, rules, narrower)
    assert visibility.view(window=window, keys=6) is visibility
    assert visibility.rows(start) is visibility.rows(start), "lowered forms are made once a batch"


causal_tables = st.sampled_from(
    [
        dict.fromkeys(product(range(3), repeat=2), (Condition.CAUSAL,)),
        dict.fromkeys(product(range(2), repeat=2), (Condition.CAUSAL,)),
        {**dict.fromkeys(product(range(3), repeat=2), (Condition.CAUSAL,)), (0, 1): (Condition.CAUSAL, Condition.SELF)},
    ]
)


@given(st.data(), st.one_of(causal_tables, rule_tables), windows)
def test_causal_and_full_agree_with_dense(data: st.DataObject, rules: Rules, window: int | None) -> None:
    """`is_causal` may miss a causal mask but must never claim one; what it claims is exactly the lower triangle."""
    count = data.draw(st.integers(1, 5))
    queries = draw_tokens(data, 2, count)
    if data.draw(st.booleans()):
        queries = [[{**slot, "rank": i, "document": slot["document"] * 0} for i, slot in enumerate(r)] for r in queries]
    keys = queries if data.draw(st.booleans()) else draw_tokens(data, 2, count)
    visibility = Visibility(axis(queries), axis(keys), rules, NAMES, window)
    live = torch.tensor([[slot["document"] >= 0 for slot in row] for row in queries])
    triangle = torch.ones(count, count, dtype=torch.bool).tril() & live.unsqueeze(2)
    if visibility.is_causal():
        assert torch.equal(visibility.dense(), triangle)
    if visibility.is_full():
        assert bool(visibility.dense().all())


@pytest.mark.parametrize(
    ("layouts", "side", "window", "causal"),
    [
        ([[("text", 3), ("image", 2), ("answer", 1)]], "right", None, True),
        ([[("text", 3), ("image", 2)], [("text", 2)]], "right", None, True),
        ([[("text", 3), ("image", 2)], [("text", 2)]], "left", None, False),
        ([[("text", 3), ("image", 2)], [("text", 2)]], "right", 4, False),
        ([[("text", 3), ("image", 2)], [("text", 2)]], "right", 5, True),
    ],
)
def test_causal_is_recognised(layouts: list, side: str, window: int | None, causal: bool) -> None:
    tokens = TokenMap.batch([TokenMap.from_layout(layout) for layout in layouts], side=side)
    whole = base_visibility(tokens)
    assert whole.view(window=window, keys=len(tokens)).is_causal() is causal


def test_packs_and_other_rules_are_not_causal() -> None:
    sample = TokenMap.from_layout([("image", 2), ("text", 2)])
    assert not base_visibility(TokenMap.pack([sample, sample])).is_causal()
    assert not ModalityMutual().visibility(sample).is_causal()
    # The rule speaks of media, but there are none: text alone is causal.
    assert ModalityMutual().visibility(TokenMap.from_layout([("text", 2), ("answer", 2)])).is_causal()


def test_padding_between_live_tokens_is_not_causal() -> None:
    """As when a prompt that is padded on the right is continued."""
    visibility = base_visibility(TokenMap.from_layout([("text", 2)]).pad(3).append(1))
    assert not visibility.is_causal()
    assert visibility.dense()[0, 3].tolist() == [True, True, False, True]


def test_full_is_the_usual_decoding_step() -> None:
    whole = base_visibility(TokenMap.from_layout([("text", 3)]))
    assert whole.rows(2).is_full()
    assert not whole.rows(1).is_full()
    padded = base_visibility(TokenMap.from_layout([("text", 3)]).pad(4, "left"))
    assert not padded.rows(3).is_full()


def test_a_rule_that_is_given_twice_counts_once() -> None:
    one = {"rank": 0, "document": 0, "segment": 0, "turn": 0, "cls": 0, "ref": 0}
    tokens = [[{**one, "slot": 0}, {**one, "slot": 1, "cls": 1}]]
    rules = {(0, 0): [Condition.ALWAYS] * 4}  # as many entries as there are pairs of two classes
    visibility = Visibility(axis(tokens), axis(tokens), rules, NAMES[:2])
    assert visibility.dense().tolist() == [[[True, False], [False, False]]]


def test_visibility_refuses() -> None:
    tokens = axis([[{"document": 0, "rank": 0, "segment": 0, "turn": 0, "cls": 0, "ref": 0, "slot": 0}]])
    with pytest.raises(ValueError, match="window must be at least 1 slot, got 0"):
        Visibility(tokens, tokens, {}, NAMES, window=0)
    message = "rule (0, 3) speaks of a class outside 0..2 (alpha, beta, gamma)"
    with pytest.raises(ValueError, match=re.escape(message)):
        Visibility(tokens, tokens, {(0, 3): [Condition.CAUSAL]}, NAMES)
    with pytest.raises(ValueError, match="2 keys were given, but the visibility knows only 1"):
        Visibility(tokens, tokens, {}, NAMES).view(window=None, keys=2)


# Pictures


def test_print_draws_the_mask() -> None:
    tokens = TokenMap.from_layout([("text", 1), ("image", 2), ("text", 1), ("answer", 1)]).pad(6)
    assert str(ModalityMutual().visibility(tokens)) == "\n".join(
        [
            "Visibility[B=1, Sq=6, Sk=6] rows see columns; M media, P prompt, A answer, . padding",
            "  PMMPA.",
            "P #·····",
            "M ##·#··",
            "M ####··",
            "P ####··",
            "A #####·",
            ". ······",
        ]
    )


def test_print_describes_long_masks() -> None:
    drawn = str(base_visibility(TokenMap.from_layout([("text", 99)])))
    assert drawn.endswith("\n(too long to draw; 50.5% of the pairs are visible)")


@pytest.mark.parametrize(("suffix", "length"), [(".png", 4), (".png", 120), (".svg", 4)])
def test_plot_writes_a_picture(tmp_path: Path, suffix: str, length: int) -> None:
    tokens = TokenMap.batch([TokenMap.from_layout(runs) for runs in ([("text", 2)], [("text", 2), ("image", length)])])
    path = tmp_path / f"mask{suffix}"
    ModalityMutual().visibility(tokens).plot(path, sample=1)
    if suffix == ".svg":
        assert "<svg" in path.read_text()
    else:
        colours = Image.open(path).convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert len(colours) > 10


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_selected_queries_and_keys_are_rows_and_columns_of_the_mask(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [TokenMap.from_layout(runs) for runs in ([("text", 2), ("image", 3), ("answer", 2)], [("image", 4)])]
    whole = base_visibility(TokenMap.batch(maps))
    queries = torch.randint(-1, 7, (2, 4), generator=generator)
    keys = torch.randint(-1, 7, (2, 5), generator=generator)
    expected = torch.nn.functional.pad(whole.dense(), (0, 1, 0, 1))
    expected = torch.stack([expected[b][queries[b]][:, keys[b]] for b in range(2)])
    assert torch.equal(whole.select(queries, keys).dense(), expected)
    both = whole.keys.gather(keys).followed_by(whole.keys)
    assert torch.equal(both.slot[:, 5:], whole.keys.slot)
    assert torch.equal(both.document[:, :5], whole.keys.gather(keys).document)
