"""Batches of ranks and workers: the same samples whoever reads them, and from wherever they start."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessor

from mmfuse.data import (
    BatchStream,
    Encoding,
    ImageAugmentation,
    Plan,
    Sample,
    StagePlan,
    StreamLoader,
    StreamProgress,
    StreamSettings,
)
from mmfuse.data.decoders import PICTURE
from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.data.sources.undecoded import Undecoded
from mmfuse.data.stream import ORIGIN
from mmfuse.errors import ConfigError, DataError
from mmfuse.models import MultimodalProcessor
from mmfuse.sequence import TokenMap

STEPS = (5, 7)
PER_STEP = 4
Batch = dict[str, Any]


class Captions:
    """Samples of ragged length: an image in 4 tokens, and 3 to 30 digits."""

    def __init__(self, name: str, size: int, longest: int = 30) -> None:
        self.name, self._size, self._longest = name, size, longest

    @property
    def parts(self) -> list[int]:
        return [self._size // 2, self._size - self._size // 2]

    def __len__(self) -> int:
        return self._size

    def key(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("the stream reads samples without their media first")

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng([index, len(self.name)])
        text = "<image>" + "".join(map(str, rng.integers(0, 10, int(rng.integers(3, self._longest + 1)))))
        picture = _png(rng)
        return Sample(f"{self.name}[{index}]", (Undecoded(lambda: picture, PICTURE, f"image {index}"),), None, text, {})

    def fingerprint(self) -> str:
        return f"{self.name}{self._size}"


def _png(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


SOURCES = {"long": Captions("long", 60), "short": Captions("short", 41, 8)}
SETTINGS = {
    "plain": StreamSettings(lanes=8),
    "packed": StreamSettings(pack_to=64, window=24, lanes=8, augment=ImageAugmentation(0.7, 0.3, 0.3, 0.5)),
    "bucketed": StreamSettings(bucket=True, window=12, lanes=8),
    "truncated": StreamSettings(max_tokens=16, lanes=8),
    "dropped": StreamSettings(pack_to=40, max_tokens=20, too_long="drop", window=20, lanes=8),
}


@pytest.fixture(scope="module")
def processor() -> MultimodalProcessor:
    pixels = SiglipImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True)
    return MultimodalProcessor(pixels, load_tokenizer(), visual_tokens=4)


Loader = Callable[..., StreamLoader]


@pytest.fixture
def loader(processor: MultimodalProcessor) -> Loader:
    def make(settings: StreamSettings, batch_size: int = 3, seed: int = 3, **where: Any) -> StreamLoader:
        plan = Plan(
            {name: source.parts for name, source in SOURCES.items()},
            [
                StagePlan({"short": 1}, STEPS[0] * PER_STEP),
                StagePlan({"short": 1, "long": 2}, STEPS[1] * PER_STEP),
            ],
            window=settings.samples(batch_size),
            seed=seed,
            lanes=settings.lanes,
            window_is_batch=settings.window_is_batch,
        )
        encoding = Encoding(SOURCES, processor, settings, batch_size, seed)
        return StreamLoader(BatchStream(plan, encoding, **where), workers=where.get("workers", 0), timeout=60)

    return make


def same(one: Batch, other: Batch) -> bool:
    """All tensors bit by bit, keys, and origin."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_workers_change_nothing(name: str, loader: Loader) -> None:
    alone = list(loader(SETTINGS[name]))
    assert len(alone) == len(loader(SETTINGS[name])) == sum(STEPS) * PER_STEP
    shared = list(loader(SETTINGS[name], workers=2))
    assert len(shared) == len(alone)
    assert all(same(one, other) for one, other in zip(alone, shared, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_run_goes_on_from_its_state_with_other_ranks_and_workers(name: str, stop: int, loader: Loader) -> None:
    """One rank until step `stop`, two until three steps later, then four without saying."""
    settings = SETTINGS[name]
    whole = list(loader(settings))
    at, state, seen = 0, dict[str, Any](), list[Batch]()
    for world, until in ((1, stop), (2, stop + 3), (4, sum(STEPS))):
        states = []
        reached: dict[int, Batch] = {}
        for rank in range(world):
            own = StreamProgress({}, settings.lanes, PER_STEP)
            if at:
                own.load_state_dict(state, main=rank == 0)
            each = PER_STEP // world
            first = at * PER_STEP
            stage = 0 if first < STEPS[0] * PER_STEP else 1
            stream = loader(settings, rank=rank, world=world, start=at * each, lanes=own.places(stage))
            for number, batch in enumerate(stream, start=1):
                reached[batch[ORIGIN]["batch"]] = batch
                own.commit(batch[ORIGIN])
                if number % each == 0:
                    own.end_step()
                if number == (until - at) * each:
                    break
            states.append(own)
        saved = [one.state_dict([other.own_state() for other in states]) for one in states]
        assert all({**one, "counts": None} == {**saved[0], "counts": None} for one in saved), "whichever rank saves"
        state = json.loads(json.dumps(saved[0]))
        assert state["steps"] == until
        seen += [reached[number] for number in sorted(reached)]
        at = until
    assert [batch[ORIGIN]["batch"] for batch in seen] == list(range(len(whole)))
    assert all(same(one, other) for one, other in zip(whole, seen, strict=True))
    expected: Counter[str] = Counter()
    for batch in whole:
        expected.update(batch[ORIGIN]["counts"])
    assert state["counts"] == expected, "every sample is counted once, by whichever rank"
    assert len(json.dumps(state)) < 600


@pytest.mark.parametrize("name", SETTINGS)
def test_a_worker_whose_first_batch_is_of_the_next_stage_begins_its_lanes_anew(name: str, loader: Loader) -> None:
    """A step before the end of a stage, a rank goes on with two workers, of which the second comes too late for it."""
    settings, last = SETTINGS[name], STEPS[0] - 1
    whole = list(loader(settings))
    progress = StreamProgress({}, settings.lanes, PER_STEP)
    for number, batch in enumerate(whole[: last * PER_STEP], start=1):
        progress.commit(batch[ORIGIN])
        if number % PER_STEP == 0:
            progress.end_step()
    found = loader(settings, rank=1, world=PER_STEP, workers=2, start=last, lanes=progress.places(0))
    assert all(same(one, other) for one, other in zip(whole[last * PER_STEP + 1 :: PER_STEP], found, strict=True))


@pytest.mark.parametrize("name", ["packed", "dropped"])
def test_packed_rows_keep_the_budget_and_lose_nothing(name: str, loader: Loader) -> None:
    settings = SETTINGS[name]
    used: Counter[str] = Counter()
    live = slots = 0
    for batch in loader(settings):
        tokens: TokenMap = batch["tokens"]
        assert tokens.shape[0] == 3 and tokens.shape[1] <= settings.pack_to
        documents = int((tokens.document.max(1).values + 1).sum())
        assert documents == len(batch["keys"]) == len(batch[ORIGIN]["ids"]) == len(batch["pixel_values"])
        used.update(batch[ORIGIN]["ids"])
        live, slots = live + int((~tokens.is_pad).sum()), slots + tokens.is_pad.numel()
    assert live / slots > (0.85 if name == "packed" else 0.7)
    if name == "packed":
        short = [count for key, count in used.items() if key.startswith("short")]
        assert len(short) == len(SOURCES["short"]), "all were seen"


def test_what_is_too_long_is_cut_or_dropped_and_counted(loader: Loader) -> None:
    counts: Counter[str] = Counter()
    for batch in loader(SETTINGS["truncated"]):
        assert batch["tokens"].shape[1] <= 16 and batch["input_ids"].shape[0] == 3
        counts.update(batch[ORIGIN]["counts"])
    assert counts["truncated/long"] > 20 and not any(kind.startswith("dropped") for kind in counts)
    counts = Counter()
    for batch in loader(SETTINGS["dropped"]):
        counts.update(batch[ORIGIN]["counts"])
    assert counts["dropped/long"] > 5 and counts["dropped/short"] == 0
    with pytest.raises(DataError, match=r"long\[\d+\]: \d\d tokens, more than the 16 that fit; see stream.too_long"):
        list(loader(replace(SETTINGS["truncated"], too_long="error")))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_limit_that_nothing_keeps_ends_the_run(workers: int, loader: Loader) -> None:
    with pytest.raises(DataError, match=r"^none of \d+ samples drawn in a row fits into 3 tokens with an answer"):
        list(loader(StreamSettings(max_tokens=3, lanes=8), workers=workers))


def test_buckets_save_padding(loader: Loader) -> None:
    def padding(settings: StreamSettings) -> float:
        maps = [batch["tokens"] for batch in loader(settings)]
        return sum(int(one.is_pad.sum()) for one in maps) / sum(one.is_pad.numel() for one in maps)

    assert padding(replace(SETTINGS["bucketed"], window=36)) < 0.5 * padding(SETTINGS["plain"])


def test_augmentation_depends_on_the_sample_and_its_epoch(loader: Loader) -> None:
    """Two draws of one sample differ, two runs do not; without augmentation all draws are one image."""
    changing = StreamSettings(lanes=8, augment=ImageAugmentation(brightness=0.5))

    def pictures(settings: StreamSettings, seed: int) -> dict[str, set[bytes]]:
        found: dict[str, set[bytes]] = {}
        for batch in loader(settings, seed=seed):
            for key, pixels in zip(batch["keys"], batch["pixel_values"], strict=True):
                found.setdefault(key, set()).add(pixels.numpy().tobytes())
        return found

    plain, one, again, other = (
        pictures(StreamSettings(lanes=8), 3),
        pictures(changing, 3),
        pictures(changing, 3),
        pictures(changing, 4),
    )
    assert all(len(seen) == 1 for seen in plain.values())
    assert one == again and one != other
    assert sum(len(seen) > 1 for seen in one.values()) > 30


def test_the_global_generator_is_left_alone(loader: Loader) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    for workers in (0, 2):
        torch.manual_seed(1)
        next(iter(loader(SETTINGS["packed"], workers=workers)))
        assert torch.equal(torch.rand(3), expected)


# State


def test_a_batch_counts_when_its_step_is_complete(loader: Loader) -> None:
    """The trainer has fetched, and even trained on, more than the last step that a checkpoint holds."""
    progress = StreamProgress({}, 8, PER_STEP)
    stream = iter(loader(SETTINGS["packed"]))
    empty = progress.state_dict([progress.own_state()])
    for _ in range(PER_STEP - 1):
        progress.commit(next(stream)[ORIGIN])
    assert progress.state_dict([progress.own_state()]) == empty
    progress.commit(next(stream)[ORIGIN])
    assert len(progress.end_step()) == PER_STEP
    state = progress.state_dict([progress.own_state()])
    assert state["steps"] == 1 and state["lanes"] != empty["lanes"]


def test_another_order_of_samples_is_refused() -> None:
    made_for = {"the data of chats": "abc", "data.batch_size": 8}
    state = StreamProgress(made_for, 8, 4).state_dict([])
    StreamProgress(made_for, 8, 4).load_state_dict(state)
    for changed, message in (
        ({"the data of chats": "abd"}, "the data of chats was abc and is now abd"),
        ({"data.batch_size": 9}, "data.batch_size was 8 and is now 9"),
        ({"more": 1}, "more was None and is now 1"),
    ):
        progress = StreamProgress({**made_for, **changed}, 8, 4)
        with pytest.raises(ConfigError, match=re.escape(message)):
            progress.load_state_dict(state)
        progress.load_state_dict(state, changed_data=True)
    with pytest.raises(ConfigError, match="has version 0, expected 1"):
        StreamProgress(made_for, 8, 4).load_state_dict({**state, "version": 0})


def test_a_step_of_other_batches_has_the_same_samples(loader: Loader) -> None:
    """Two batches of 6 instead of four of 3, from the middle of a stage on; unless samples were dropped before."""
    whole = loader(SETTINGS["plain"])
    for steps in (1, 6):
        progress = StreamProgress({}, 8, 4)
        for number, batch in enumerate(whole, start=1):
            progress.commit(batch[ORIGIN])
            if number % 4 == 0:
                progress.end_step()
            if number == steps * 4:
                break
        state = progress.state_dict([progress.own_state()])
        later = StreamProgress({}, 8, 2)
        later.load_state_dict(state)
        done = (steps - (STEPS[0] if steps > STEPS[0] else 0)) * 2
        assert [place.window for place in later.places(later.stage)] == [
            min(window for window in range(done, done + 8) if window % 8 == lane) for lane in range(8)
        ]
        assert all(place.row == 0 for place in later.lanes)
    state["lanes"][0] = [state["lanes"][0][0], 1]
    with pytest.raises(ConfigError, match="made with 4 batches per optimizer step, and this run has 2; as samples"):
        StreamProgress({}, 8, 2).load_state_dict(state)


def test_lanes_must_be_shared_evenly(loader: Loader) -> None:
    with pytest.raises(ConfigError, match=r"stream.lanes is 8, which 3 ranks with 1 readers each cannot share evenly"):
        loader(SETTINGS["plain"], world=3)
    with pytest.raises(ConfigError, match=r"2 ranks with 3 readers"):
        loader(SETTINGS["plain"], world=2, workers=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pack_to": 0}, "stream.pack_to must be at least 1, got 0"),
        ({"lanes": 0}, "stream.lanes must be at least 1, got 0"),
        ({"too_long": "cut"}, "stream.too_long must be truncate, drop or error, got 'cut'"),
        ({"timeout": -1}, "stream.timeout must be 0 or more seconds, got -1"),
        ({"pack_to": 64, "bucket": True}, "stream.pack_to and stream.bucket exclude each other"),
        ({"pack_to": 64, "max_tokens": 65}, "stream.max_tokens 65 is more than stream.pack_to 64 holds"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        StreamSettings(**arguments)


def test_a_window_holds_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"stream.window 4 holds fewer samples than a batch of 8"):
        StreamSettings(bucket=True, window=4).check(8)
    with pytest.raises(ConfigError, match=r"data.batch_size must be at least 1, got 0"):
        StreamSettings().check(0)
    with pytest.raises(ConfigError, match=r"augment.crop is the share of an image"):
        ImageAugmentation(crop=0)
    with pytest.raises(ConfigError, match=r"augment.flip must lie between 0 and 1, got 2"):
        ImageAugmentation(flip=2)
