"""What the contract suite runs over: a strategy joins by its line in `FUSIONS`, a decoder by its line in `FAMILIES`.

The full cross product would say little more than this covering design: every strategy with every family on a ragged
batch, and on Llama every strategy with every arrangement of samples, every attention backend, and both multi-head and
grouped-query attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import cycle, product

import pytest
from _pytest.mark import ParameterSet
from torch import Tensor

from mmfuse.fusion import FUSIONS
from mmfuse.kernels import BACKENDS, BackendError
from mmfuse.models import MultimodalLM
from mmfuse.sequence import Side, TokenMap
from mmfuse.testing import FAMILIES, Layout, tiny_batch, tiny_model

#: Backends that run in an interpreter without a GPU: one arrangement of each strategy, among the slow tests.
INTERPRETED = ("triton",)

REFUSALS = pytest.StashKey[Counter[str]]()

ONE_IMAGE: Layout = [("text", 3), ("image", 4), ("text", 4), ("answer", 3)]
SEVERAL_IMAGES: Layout = [("text", 2), ("image", 4), ("image", 4), ("text", 3), ("answer", 3)]
INTERLEAVED: Layout = [("text", 1), ("image", 4), ("text", 2), ("image", 4), ("text", 2), ("answer", 3)]
TEXT_ONLY: Layout = [("text", 5), ("answer", 3)]
NO_INSTRUCTION: Layout = [("text", 1), ("image", 4), ("answer", 4)]
TWO_TURNS: Layout = [
    *[("text", 2), ("image", 4), ("text", 2), ("answer", 2)],
    *[("text", 2), ("image", 4), ("text", 1), ("answer", 3)],
]
IMAGE_AUDIO: Layout = [("text", 2), ("image", 4), ("audio", 3), ("text", 3), ("answer", 3)]
AUDIO_FIRST: Layout = [("text", 1), ("audio", 3), ("text", 2), ("image", 4), ("text", 2), ("answer", 3)]
MEDIA_AFTER_TEXT: Layout = [("text", 4), ("image", 4), ("answer", 3)]
RAGGED = [ONE_IMAGE, TEXT_ONLY, TWO_TURNS]


@dataclass(frozen=True)
class Arrangement:
    """Samples, and how they lie in a batch."""

    samples: list[Layout]
    side: Side = "right"
    pack: bool = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of the media in the samples; images, which every model here takes, come first."""
        kinds = {kind for sample in self.samples for kind, _ in sample}
        return ("image", *sorted(kinds - {"text", "image", "answer"}))


ARRANGEMENTS = {
    "one_image": Arrangement([ONE_IMAGE] * 2),
    "several_images": Arrangement([SEVERAL_IMAGES] * 2),
    "interleaved": Arrangement([INTERLEAVED] * 2),
    "text_only": Arrangement([TEXT_ONLY] * 2),
    "no_instruction": Arrangement([NO_INSTRUCTION] * 2),
    "two_turns": Arrangement([TWO_TURNS] * 2),
    "image_audio": Arrangement([IMAGE_AUDIO] * 2),
    "audio_first_text_between": Arrangement([AUDIO_FIRST] * 2),
    "media_after_text": Arrangement([MEDIA_AFTER_TEXT] * 2),
    "packed": Arrangement([ONE_IMAGE, NO_INSTRUCTION, TEXT_ONLY, TWO_TURNS], pack=True),
    "ragged_right": Arrangement(RAGGED, side="right"),
    "ragged_left": Arrangement(RAGGED, side="left"),
}


@dataclass(frozen=True)
class Case:
    """One cell of the design."""

    fusion: str
    family: str
    kv_heads: int
    arrangement: str
    backend: str

    def __str__(self) -> str:
        return f"{self.fusion}-{self.family}-kv{self.kv_heads}-{self.arrangement}-{self.backend}"


def design() -> list[Case]:
    heads = cycle((4, 2, 1))
    cases = []
    for fusion in FUSIONS:
        cases += [Case(fusion, family, next(heads), "ragged_left", "auto") for family in FAMILIES]
        for name, backend, kv_heads in product(ARRANGEMENTS, ("reference", "sdpa"), (4, 2)):
            cases.append(Case(fusion, "llama", kv_heads, name, backend))
        # The other backends are compared with these on random masks, too: here grouped queries will do.
        for name, backend in product(ARRANGEMENTS, ("rectangles", "flex")):
            cases.append(Case(fusion, "llama", 2, name, backend))
        cases += [Case(fusion, "llama", 2, "ragged_left", backend) for backend in INTERPRETED]
    return cases


def marked(case: Case) -> ParameterSet:
    return pytest.param(case, marks=[pytest.mark.slow] if case.backend in INTERPRETED else [])


@pytest.fixture(params=map(marked, design()), ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def model(case: Case) -> MultimodalLM:
    modalities = ARRANGEMENTS[case.arrangement].modalities
    made = tiny_model(case.fusion, case.family, kv_heads=case.kv_heads, modalities=modalities)
    made.config.attention_backend = case.backend
    return made


@pytest.fixture
def arrange(case: Case, model: MultimodalLM) -> Callable[..., dict[str, Tensor | TokenMap]]:
    """Makes the batch of the case's samples; `side` and `pack` can be chosen anew."""
    arrangement = ARRANGEMENTS[case.arrangement]

    def make(side: Side = arrangement.side, pack: bool = arrangement.pack) -> dict[str, Tensor | TokenMap]:
        return tiny_batch(model, arrangement.samples, side=side, pack=pack)

    return make


@pytest.fixture
def batch(arrange: Callable[..., dict[str, Tensor | TokenMap]]) -> dict[str, Tensor | TokenMap]:
    return arrange()


@pytest.fixture(params=FUSIONS)
def fusion(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """What a backend refuses by name it need not keep; what was refused is listed behind the tests."""
    try:
        return (yield)
    except BackendError as error:
        case = item.funcargs.get("case") if isinstance(item, pytest.Function) else None
        if case is None or case.backend not in BACKENDS:
            raise
        refused = item.config.stash.setdefault(REFUSALS, Counter())
        refused[f"{case.backend} refuses {case.fusion}: {str(error).split(': ', 1)[-1].split('. Backends')[0]}"] += 1
        pytest.skip(str(error))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for refusal, count in sorted(config.stash.get(REFUSALS, Counter()).items()):
        terminalreporter.write_line(f"{count} contract tests skipped: {refusal}")
