"""Chats of an adopted model in packed rows: as long as they say, and taught the same as each in a row of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmfuse.data.packing import truncate
from mmfuse.errors import DataError
from mmfuse.models import MultimodalLM
from mmfuse.models.adopt.processor import AdoptedProcessor, RenderedChat
from mmfuse.testing.vlms import VLMS, tiny_vlm

#: Sizes of the images of each chat; PaliGemma takes one.
CHATS = [[(24, 20)], [(40, 16), (24, 20)], [], [(18, 48)]]


def chats_of(processor: AdoptedProcessor, single: bool) -> list[RenderedChat]:
    rng = np.random.default_rng(0)
    chats = []
    for number, sizes in enumerate(CHATS):
        if single and len(sizes) != 1:
            continue
        images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        turns: list[dict[str, Any]] = []
        for place in range(max(1, len(sizes))):
            question = "what is this ?" if place == 0 else "and this ?"
            turns.append({"role": "user", "content": "<image>" * bool(sizes) + question})
            turns.append({"role": "assistant", "content": ("a cat", "the dog", "a dog", "the cat")[number]})
        chats.append(processor.encoder.encode_messages(turns, images))
    return chats


@pytest.mark.parametrize("family", VLMS)
def test_length_is_that_of_the_processors_output(family: str) -> None:
    processor = AdoptedProcessor(tiny_vlm(family)[1])
    for chat in chats_of(processor, family == "paligemma"):
        assert len(chat) == processor.collate([chat])["input_ids"].shape[1]


@pytest.mark.parametrize("family", VLMS)
def test_packed_rows_teach_the_same(family: str) -> None:
    vlm, own = tiny_vlm(family)
    processor = AdoptedProcessor(own)
    model = MultimodalLM.from_vlm(vlm).train()
    chats = chats_of(processor, family == "paligemma")
    rows = [chats] if family == "paligemma" else [chats[:2], chats[2:]]
    one_by_one = processor.collate(chats)
    batch = processor.collate_rows(rows)
    assert "rows" not in processor.collate_rows([[chat] for chat in chats])
    packed = model.prepared(batch)
    assert packed["input_ids"].shape == packed["labels"].shape == packed["tokens"].shape
    assert packed["input_ids"].shape == (len(rows), max(sum(map(len, row)) for row in rows))
    losses, gradients = [], []
    for inputs in (one_by_one, packed):
        model.zero_grad()
        output = model(**inputs)
        (output.loss * output.supervised).backward()
        losses.append(output.loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    scale = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-5 * max(1.0, scale), msg=name)


def test_documents_and_segments_are_numbered_in_their_row() -> None:
    vlm, own = tiny_vlm("llava")
    processor = AdoptedProcessor(own)
    chats = chats_of(processor, single=False)
    tokens = MultimodalLM.from_vlm(vlm).prepared(processor.collate_rows([chats[:2], chats[2:]]))["tokens"]
    alone = [MultimodalLM.from_vlm(vlm).prepared(processor.collate([chat]))["tokens"] for chat in chats]
    for row, members in enumerate((alone[:2], alone[2:])):
        at = segments = 0
        for document, own_map in enumerate(members):
            here = slice(at, at + len(own_map))

            def column(name: str, here: slice = here, row: int = row) -> Tensor:
                values: Tensor = getattr(tokens, name)
                return values[row, here]

            assert (column("document") == document).all()
            assert torch.equal(column("segment"), own_map.segment[0] + segments)
            for name in ("modality", "role", "turn", "position"):
                assert torch.equal(column(name), getattr(own_map, name)[0])
            at, segments = at + len(own_map), segments + int(own_map.segment.max()) + 1
        assert tokens.is_pad[row, at:].all()


def test_chats_cannot_be_cut() -> None:
    chat = chats_of(AdoptedProcessor(tiny_vlm("llava")[1]), single=False)[0]
    assert truncate(chat, len(chat)) is chat  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"the chats of an adopted model cannot be cut: set stream\.too_long to drop"):
        truncate(chat, len(chat) - 1)  # type: ignore[arg-type]
