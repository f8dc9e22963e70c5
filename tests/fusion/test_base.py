"""What every strategy inherits: the choice of layers, the checks of labels and of caches, and building by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from mmfuse.errors import ConfigError
from mmfuse.fusion import FUSIONS, Causal, Fusion, ModalityMutual, PrefixLM, build_fusion
from mmfuse.fusion.base import base_visibility
from mmfuse.sequence import Role, TokenMap

LAYOUT = [("text", 2), ("image", 3), ("text", 2), ("answer", 2)]


@pytest.mark.parametrize("name", FUSIONS)
def test_build_by_name_and_by_spec(name: str) -> None:
    assert type(build_fusion(name)) is FUSIONS[name]
    assert build_fusion(name).layers is None
    assert build_fusion({"type": name, "layers": [1, 3]}).layers == (1, 3)


def test_building_leaves_the_spec_as_it_was() -> None:
    spec = {"type": "mma", "layers": [0]}
    build_fusion(spec)
    assert spec == {"type": "mma", "layers": [0]}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mmaa", "unknown fusion 'mmaa': did you mean 'mma'? Known: "),
        ({"layers": [0]}, "unknown fusion None"),
        ({"type": "mma", "layer": [0]}, "unknown key in fusion 'mma' 'layer': did you mean 'layers'?"),
    ],
)
def test_building_refuses(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_fusion(spec)


def test_layers() -> None:
    assert [Causal().changes(i) for i in range(3)] == [True, True, True]
    assert [Causal(layers=[]).changes(i) for i in range(3)] == [False, False, False]
    assert [Causal(layers=[0, 2]).changes(i) for i in range(3)] == [True, False, True]
    ModalityMutual(layers=[0, 1]).check_layers(2)
    ModalityMutual().check_layers(0)
    for layer in (2, -1):
        message = f"ModalityMutual(layers=…) names layer {layer}; the decoder has 0..1"
        with pytest.raises(ValueError, match=re.escape(message)):
            ModalityMutual(layers=[0, layer]).check_layers(2)


def test_the_default_strategy_is_causal() -> None:
    tokens = TokenMap.from_layout(LAYOUT)
    assert torch.equal(Fusion().visibility(tokens).dense(), base_visibility(tokens).dense())


@pytest.mark.parametrize("strategy", [ModalityMutual, PrefixLM])
def test_labels_outside_answers_are_refused(strategy: type[Fusion]) -> None:
    tokens = TokenMap.batch([TokenMap.from_layout(LAYOUT[:2]), TokenMap.from_layout(LAYOUT)])
    labels = torch.where(tokens.is_answer, 7, -100)
    strategy().check_labels(tokens, labels)
    labels[1, 6] = 7
    message = (
        f"label at sample 1, slot 6 supervises a prompt token, but {strategy.__name__} lets tokens before it see it"
    )
    with pytest.raises(ValueError, match=message):
        strategy().check_labels(tokens, labels)
    strategy(layers=[]).check_labels(tokens, labels)
    Causal().check_labels(tokens, labels)


@pytest.mark.parametrize("strategy", [ModalityMutual, PrefixLM])
def test_a_prompt_cannot_be_prefilled_in_parts_that_see_each_other(strategy: type[Fusion]) -> None:
    tokens = TokenMap.batch([TokenMap.from_layout([("text", 9)]), TokenMap.from_layout(LAYOUT)])
    text = 0 if strategy is PrefixLM else 1  # PrefixLM stops at the text of sample 0, MMA at the image of sample 1
    message = f"sample {text}: {strategy.__name__} lets cached tokens see the prompt tokens that are being added"
    for cached in (5, 6):
        with pytest.raises(ValueError, match=message):
            strategy().check_cached(tokens, cached)
    strategy(layers=[]).check_cached(tokens, 5)
    Causal().check_cached(tokens, 5)


def test_later_turns_can_be_added_to_a_cache() -> None:
    first = TokenMap.from_layout(LAYOUT)
    tokens = first.append(3, role=Role.PROMPT)
    for strategy in (ModalityMutual(), PrefixLM()):
        strategy.check_cached(tokens, len(first))
        strategy.check_cached(first, 7)
    with pytest.raises(ValueError, match="sample 0: PrefixLM"):
        PrefixLM().check_cached(TokenMap.from_layout(LAYOUT[:3]), 3)
