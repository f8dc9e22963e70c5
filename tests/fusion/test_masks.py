"""The masks of the strategies against truth tables that were written by hand from the papers.

Rows are queries and columns are keys: S system, I and J images, Q question up to the answer header, A answer.
"""

from __future__ import annotations

import pytest
import torch

from mmfuse.fusion import FUSIONS, Causal, Fusion, ModalityMutual, PrefixLM
from mmfuse.sequence import TokenMap

LAYOUTS = {
    "one image": [("text", 2), ("image", 3), ("text", 2), ("answer", 2)],
    "two images": [("text", 1), ("image", 2), ("text", 1), ("image", 2), ("text", 1), ("answer", 1)],
    "two turns": [
        *[("text", 1), ("image", 2), ("text", 1), ("answer", 1)],
        *[("text", 1), ("image", 1), ("text", 1), ("answer", 1)],
    ],
    "question, answer, question": [("image", 2), ("text", 1), ("answer", 1), ("text", 2), ("answer", 1)],
    "no instruction": [("text", 1), ("image", 2), ("answer", 3)],
    "text only": [("text", 3), ("answer", 2)],
}

# AKI, eq. of M': j <= i, or i is an image token and j a token of the question; never the answer.
MMA = {
    "one image": """
        SSIIIQQAA
        100000000
        110000000
        111001100
        111101100
        111111100
        111111000
        111111100
        111111110
        111111111""",
    # The text between the images is part of what is asked, so both see all of it; images stay causal to each other.
    "two images": """
        SIIQJJQA
        10000000
        11010010
        11110010
        11110000
        11111010
        11111110
        11111110
        11111111""",
    # Each image sees the prompt of its own turn only.
    "two turns": """
        SIIQAQJQA
        100000000
        110100000
        111100000
        111100000
        111110000
        111111000
        111111110
        111111110
        111111111""",
    "question, answer, question": """
        IIQAQQA
        1010000
        1110000
        1110000
        1111000
        1111100
        1111110
        1111111""",
}

# PaliGemma: the prefix is one block, the suffix causal.
PREFIX = {
    "one image": """
        SSIIIQQAA
        111111100
        111111100
        111111100
        111111100
        111111100
        111111100
        111111100
        111111110
        111111111""",
    "two images": """
        SIIQJJQA
        11111110
        11111110
        11111110
        11111110
        11111110
        11111110
        11111110
        11111111""",
    "two turns": """
        SIIQAQJQA
        111100000
        111100000
        111100000
        111100000
        111110000
        111111000
        111111100
        111111110
        111111111""",
    "question, answer, question": """
        IIQAQQA
        1110000
        1110000
        1110000
        1111000
        1111100
        1111110
        1111111""",
    "no instruction": """
        SIIAAA
        111000
        111000
        111000
        111100
        111110
        111111""",
    "text only": """
        SSSAA
        11100
        11100
        11100
        11110
        11111""",
}


def drawn(table: str) -> torch.Tensor:
    rows = table.split()[1:]
    return torch.tensor([[cell == "1" for cell in row] for row in rows])


def mask(fusion: Fusion, tokens: TokenMap) -> torch.Tensor:
    return fusion.visibility(tokens).dense()


@pytest.mark.parametrize("name", MMA)
def test_modality_mutual(name: str) -> None:
    assert torch.equal(mask(ModalityMutual(), TokenMap.from_layout(LAYOUTS[name]))[0], drawn(MMA[name]))


@pytest.mark.parametrize("name", PREFIX)
def test_prefix_lm(name: str) -> None:
    assert torch.equal(mask(PrefixLM(), TokenMap.from_layout(LAYOUTS[name]))[0], drawn(PREFIX[name]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_causal_is_the_lower_triangle(name: str) -> None:
    tokens = TokenMap.from_layout(LAYOUTS[name])
    visibility = Causal().visibility(tokens)
    assert torch.equal(visibility.dense()[0], torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril())
    assert visibility.is_causal()


@pytest.mark.parametrize("name", ["no instruction", "text only"])
def test_modality_mutual_without_a_question_about_a_medium_is_causal(name: str) -> None:
    tokens = TokenMap.from_layout(LAYOUTS[name])
    assert torch.equal(mask(ModalityMutual(), tokens), mask(Causal(), tokens))


def test_modality_mutual_treats_all_media_alike() -> None:
    for kind in ("audio", "eeg"):
        layout = [(kind if run == "image" else run, length) for run, length in LAYOUTS["one image"]]
        assert torch.equal(mask(ModalityMutual(), TokenMap.from_layout(layout))[0], drawn(MMA["one image"]))


def test_a_medium_without_question_after_it_sees_the_prompt_before_it() -> None:
    tokens = TokenMap.from_layout([("text", 2), ("image", 2), ("answer", 2)])
    assert torch.equal(mask(ModalityMutual(), tokens), mask(Causal(), tokens))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_holds_the_masks_of_its_samples(fusion: str, side: str) -> None:
    strategy = FUSIONS[fusion]()
    maps = [TokenMap.from_layout(layout) for layout in LAYOUTS.values()]
    dense = mask(strategy, TokenMap.batch(maps, side=side))
    for row, sample in zip(dense, maps, strict=True):
        start = 0 if side == "right" else dense.shape[1] - len(sample)
        live = slice(start, start + len(sample))
        assert torch.equal(row[live, live], mask(strategy, sample)[0])
        assert int(row.sum()) == int(row[live, live].sum()), "padding sees or is seen"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_pack_holds_the_masks_of_its_documents_and_nothing_between_them(fusion: str) -> None:
    strategy = FUSIONS[fusion]()
    maps = [TokenMap.from_layout(layout) for layout in LAYOUTS.values()]
    expected = torch.block_diag(*(mask(strategy, sample)[0].int() for sample in maps)).bool()
    assert torch.equal(mask(strategy, TokenMap.pack(maps))[0], expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_appended_answers_do_not_change_the_mask_of_the_prompt(fusion: str) -> None:
    strategy = FUSIONS[fusion]()
    prompt = TokenMap.from_layout(LAYOUTS["one image"][:-1])
    whole = mask(strategy, prompt.append(2))
    assert torch.equal(whole, mask(strategy, TokenMap.from_layout(LAYOUTS["one image"])))
    assert torch.equal(whole[:, :7, :7], mask(strategy, prompt))
