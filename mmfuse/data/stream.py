"""Batches of one rank, in the order of the plan: windows are encoded, packed or bucketed, and dealt by lanes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.sharedctypes import RawArray
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mmfuse.data.augmentation import ImageAugmentation
from mmfuse.data.packing import is_supervised, pack, truncate
from mmfuse.data.plan import Draw, Plan
from mmfuse.data.quarantine import BadSampleLimit, Quarantine, retried
from mmfuse.data.samples import encode_sample
from mmfuse.data.shuffle import number_of, permutation
from mmfuse.data.sources import Source
from mmfuse.data.sources.undecoded import decode
from mmfuse.errors import ConfigError, DataError, RunError
from mmfuse.models import MultimodalProcessor
from mmfuse.models.chat import EncodedSample

TooLong = Literal["truncate", "drop", "error"]
#: Under this key a batch says where it stands: an `Origin` as a plain dict.
ORIGIN: Final = "origin"
#: Bytes in which a worker says what it reads.
_NOTE: Final = 512
#: What a batch holds beside the inputs of the network.
NO_INPUTS: Final = frozenset({"keys", ORIGIN})


@dataclass(frozen=True)
class StreamSettings:
    """How training samples become batches; `batch_size` is the number of their rows.

    Attributes:
        pack_to: fill each row with several samples, up to so many tokens, media included; they do not see each other.
        max_tokens: the longest sample; by default `pack_to`.
        too_long: what happens to a longer one: `truncate` (never through a medium; a sample without an answer left is
            dropped), `drop` or `error`. Both are counted and reported.
        bucket: put samples of similar length into a batch, so that there is less padding.
        window: samples that are packed or bucketed together, and held in memory by each lane without their media.
        lanes: into how many parts the order of samples is dealt. Ranks x workers must divide it.
        augment: random changes of training images.
        timeout: seconds after which workers that bring no batch end the run; 0 waits for ever.
        bad_samples: how many samples of a source may be unusable before the run ends.
        allow_changes: resume although the data or these settings are others than before; samples are then repeated or
            left out.

    Raises:
        ConfigError: settings that are out of range or contradict each other.
    """

    pack_to: int | None = None
    max_tokens: int | None = None
    too_long: TooLong = "truncate"
    bucket: bool = False
    window: int = 256
    lanes: int = 48
    augment: ImageAugmentation | None = None
    timeout: float = 600.0
    bad_samples: BadSampleLimit = field(default_factory=BadSampleLimit)
    allow_changes: bool = False

    def __post_init__(self) -> None:
        for name in ("pack_to", "max_tokens", "window", "lanes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"stream.{name} must be at least 1, got {value}")
        if self.too_long not in ("truncate", "drop", "error"):
            raise ConfigError(f"stream.too_long must be truncate, drop or error, got {self.too_long!r}")
        if self.timeout < 0:
            raise ConfigError(f"stream.timeout must be 0 or more seconds, got {self.timeout}")
        if self.pack_to is not None and self.bucket:
            raise ConfigError("stream.pack_to and stream.bucket exclude each other: packed rows have one length")
        if self.pack_to is not None and self.max_tokens is not None and self.max_tokens > self.pack_to:
            raise ConfigError(f"stream.max_tokens {self.max_tokens} is more than stream.pack_to {self.pack_to} holds")

    def check(self, batch_size: int) -> None:
        """Raise ConfigError unless batches may have so many rows."""
        if batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, got {batch_size}")
        if not self.window_is_batch and self.window < batch_size:
            raise ConfigError(f"stream.window {self.window} holds fewer samples than a batch of {batch_size}")

    @property
    def window_is_batch(self) -> bool:
        """Whether every window becomes one batch: neither packed nor bucketed."""
        return self.pack_to is None and not self.bucket

    def samples(self, batch_size: int) -> int:
        """Samples in a window."""
        return batch_size if self.window_is_batch else self.window

    @property
    def limit(self) -> int | None:
        """Tokens of the longest sample that fits."""
        return self.max_tokens if self.max_tokens is not None else self.pack_to

    def order_settings(self, batch_size: int, per_step: int) -> dict[str, Any]:
        """What the order of samples depends on, by the name that messages use.

        Args:
            batch_size: rows of a batch.
            per_step: batches of an optimizer step, of all ranks together.
        """
        names = ["max_tokens", "too_long", "lanes", *([] if self.window_is_batch else ["pack_to", "bucket", "window"])]
        settings = {f"data.stream.{name}": getattr(self, name) for name in names}
        # Where a window is a batch, the samples of a step are the same in whatever batches.
        sizes = {"data.batch_size": batch_size, "batches per optimizer step": per_step}
        sizes = {"samples per optimizer step": batch_size * per_step} if self.window_is_batch else sizes
        return {**settings, **sizes, "data.stream.augment": str(self.augment)}


class Drawn(NamedTuple):
    """A sample of a window, its media still undecoded."""

    draw: Draw
    encoded: EncodedSample


class Place(NamedTuple):
    """The next row of a lane."""

    window: int
    row: int


class Origin(NamedTuple):
    """Where a batch stands in the run, and what happened on the way to it.

    Attributes:
        batch: its number among the batches of all ranks.
        stage, lane: which lane of which stage it comes from.
        after: the lane's next row.
        counts: how many samples there were of each kind, by `kind/source`: `used`, `truncated`, `dropped`,
            `bad`.
        ids: `source/key` of each sample, in the order of the rows.
    """

    batch: int
    stage: int
    lane: int
    after: tuple[int, int]
    counts: dict[str, int]
    ids: list[str]


@dataclass(frozen=True)
class Encoding:
    """What makes rows of drawn samples.

    Attributes:
        sources: by name.
        processor: encodes samples and collates rows.
        settings: what a window becomes.
        batch_size: rows in a batch.
        seed: of augmentation, and of the order of rows.
        quarantine: where samples that cannot be used are written down.
    """

    sources: Mapping[str, Source]
    processor: MultimodalProcessor
    settings: StreamSettings
    batch_size: int
    seed: int
    quarantine: Quarantine = field(default_factory=lambda: Quarantine(None))

    def rows(self, stage: int, window: int, draws: Sequence[Draw]) -> tuple[list[list[Drawn]], Counter[str]]:
        """The rows of a window, and counts of what did not go into them as it was."""
        counts: Counter[str] = Counter()
        kept = [drawn for draw in draws if (drawn := self._encoded(draw, counts)) is not None]
        if self.settings.window_is_batch:
            return [[drawn] for drawn in kept], counts
        lengths = [len(drawn.encoded) for drawn in kept]
        order = (self.seed, number_of("rows", stage, window))
        if self.settings.pack_to is not None:
            packed = pack(lengths, self.settings.pack_to)
            return [[kept[one] for one in packed[row]] for row in permutation(order, len(packed)).tolist()], counts
        size = self.batch_size
        numbers = sorted(range(len(kept)), key=lambda one: (lengths[one], one))
        batches = [numbers[at : at + size] for at in range(0, len(numbers) // size * size, size)]
        rest = numbers[len(batches) * size :]
        numbers = [one for batch in permutation(order, len(batches)).tolist() for one in batches[batch]] + rest
        return [[kept[one]] for one in numbers], counts

    def _encoded(self, draw: Draw, counts: Counter[str]) -> Drawn | None:
        source = self.sources[draw.source]
        key = source.key(draw.sample)
        limit = self.settings.limit

        def encode() -> EncodedSample:
            made = encode_sample(retried(lambda: source.read(draw.sample), key), self.processor.encoder)
            if not self.settings.window_is_batch or limit is not None:
                len(made)  # an adopted model's processor needs the sizes of images for it, and they may be damaged
            return made

        encoded = self.quarantine.attempt(draw.source, key, encode)
        if encoded is None:
            counts[f"bad/{draw.source}"] += 1
            return None
        if limit is None or len(encoded) <= limit:
            return Drawn(draw, self._kept(encoded))
        if self.settings.too_long == "error":
            raise DataError(
                f"{encoded.key}: {len(encoded)} tokens, more than the {limit} that fit; see stream.too_long and "
                "`mmfuse data lint`"
            )
        short = truncate(encoded, limit) if self.settings.too_long == "truncate" else None
        if short is None or not is_supervised(short):
            counts[f"dropped/{draw.source}"] += 1
            return None
        counts[f"truncated/{draw.source}"] += 1
        return Drawn(draw, self._kept(short))

    def _kept(self, sample: EncodedSample) -> EncodedSample:
        """As small as can be where a lane keeps it until its row is due: 12 bytes a token."""
        if self.settings.window_is_batch or not isinstance(sample, EncodedSample):
            return sample
        return replace(sample, input_ids=sample.input_ids.astype(np.int32), table=sample.table.astype(np.int16))

    def decoded(self, rows: Sequence[Sequence[Drawn]], counts: Counter[str]) -> list[list[Drawn]]:
        """Decode the media of rows; samples whose media are damaged are counted and left out, and rows of only such."""
        kept = []
        for row in rows:
            good = []
            for drawn in row:
                source, key = drawn.draw.source, drawn.encoded.key
                ready = self.quarantine.check(source, key, partial(self._ready, drawn))
                if ready is None:
                    counts[f"bad/{source}"] += 1
                else:
                    good.append(Drawn(drawn.draw, ready))
            kept += [good] if good else []
        return kept

    def batch(self, rows: Sequence[Sequence[Drawn]]) -> dict[str, Any]:
        """Collate rows of decoded samples: the network's inputs, and `keys` to name samples by."""
        ready = [[drawn.encoded for drawn in row] for row in rows]
        keys = [sample.key for row in ready for sample in row]
        return {**self.processor.collate_rows(ready), "keys": keys}

    def _ready(self, drawn: Drawn) -> EncodedSample:
        media = {
            name: [retried(partial(decode, item), drawn.encoded.key) for item in items]
            for name, items in drawn.encoded.media.items()
        }
        augment = self.settings.augment
        if augment is not None and "image" in media:
            rng = drawn.draw.generator(self.seed)
            media["image"] = [augment(image, rng) for image in media["image"]]
        return replace(drawn.encoded, media=media)


class BatchStream(IterableDataset[dict[str, Any]]):
    """The batches of one rank from some batch on, shared out over worker processes.

    Args:
        plan: which samples a window holds.
        encoding: what is made of them.
        rank, world: which rank this is, of how many.
        workers: processes that share the batches; 0 for none.
        start: the first batch, of this rank.
        lanes: the next row of each lane in the stage of the first batch; by default its first.

    Raises:
        ConfigError: the plan's lanes cannot be shared evenly among ranks and workers.
    """

    def __init__(
        self,
        plan: Plan,
        encoding: Encoding,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start: int = 0,
        lanes: Sequence[Place] | None = None,
    ) -> None:
        readers = world * max(1, workers)
        if plan.lanes % readers:
            raise ConfigError(
                f"stream.lanes is {plan.lanes}, which {world} ranks with {max(1, workers)} readers each cannot share "
                f"evenly; choose data.num_workers so that ranks x workers divides {plan.lanes}, or, for a new run, "
                f"stream.lanes as a multiple of {readers}"
            )
        self.plan, self.encoding, self.rank, self.world, self.start = plan, encoding, rank, world, start
        self._notes = [RawArray("c", _NOTE) for _ in range(workers)]
        self.lanes = list(lanes) if lanes is not None else first_places(plan.lanes)

    def __iter__(self) -> Iterator[Any]:
        """Yield batches; an error of the data is yielded, too, so that its message comes through from a worker."""
        worker = get_worker_info()
        own, all_ = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            self.encoding.quarantine.notes = self._notes[own]
        length = len(self.plan) // self.world
        # Not the stage of this worker's first batch: that may lie in a later one already.
        begun = self.plan.lane_of(self.start * self.world + self.rank)[0] if self.start < length else -1
        stage, open_lanes = -1, dict[int, _Lane]()
        for number in range(self.start + own, length, all_):
            batch = number * self.world + self.rank
            now, lane = self.plan.lane_of(batch)
            if now != stage:
                places = self.lanes if now == begun else first_places(self.plan.lanes)
                stage, open_lanes = now, {}
            if lane not in open_lanes:
                open_lanes[lane] = _Lane(self.plan, self.encoding, stage, places[lane])
            try:
                yield self._batch(batch, stage, lane, open_lanes[lane])
            except (DataError, ConfigError, RunError, OSError) as error:
                yield Failure(error)
                return

    def reading(self) -> list[str]:
        """What each worker read last, as `source/key`."""
        return [bytes(note.value).decode(errors="replace") for note in self._notes]

    def _batch(self, number: int, stage: int, lane: int, opened: _Lane) -> dict[str, Any]:
        rows, counts = list[list[Drawn]](), Counter[str]()
        while (missing := self.encoding.batch_size - len(rows)) > 0:
            taken, new = opened.take(missing)
            counts.update(new)
            rows += self.encoding.decoded(taken, counts)
        drawn = [one for row in rows for one in row]
        counts.update(f"used/{one.draw.source}" for one in drawn)
        ids = [f"{one.draw.source}/{one.encoded.key}" for one in drawn]
        origin = Origin(number, stage, lane, (opened.place.window, opened.place.row), dict(counts), ids)
        return {**self.encoding.batch(rows), ORIGIN: origin._asdict()}


@dataclass(frozen=True)
class Failure:
    """An error on its way to the main process."""

    error: Exception


class _Lane:
    """The rows of the windows of one lane, behind each other."""

    def __init__(self, plan: Plan, encoding: Encoding, stage: int, place: Place) -> None:
        self._plan, self._encoding, self._stage = plan, encoding, stage
        self.place = place
        self._rows: list[list[Drawn]] | None = None
        self._counts: Counter[str] = Counter()

    def take(self, count: int) -> tuple[list[list[Drawn]], Counter[str]]:
        """The next rows, and what was counted since the last ones."""
        taken: list[list[Drawn]] = []
        empty = 0
        while len(taken) < count:
            if self._rows is None:
                draws = self._plan.window(self._stage, self.place.window)
                self._rows, counts = self._encoding.rows(self._stage, self.place.window, draws)
                # Those of a window that is gone on with were counted with its first row.
                self._counts.update(counts if self.place.row == 0 else {})
                empty = 0 if self._rows else empty + len(draws)
                if empty > 2 * self._plan.samples_of(self._stage):
                    raise DataError(
                        f"none of {empty} samples drawn in a row fits into {self._encoding.settings.limit} tokens with "
                        "an answer; raise stream.max_tokens or stream.pack_to"
                    )
            new = self._rows[self.place.row : self.place.row + count - len(taken)]
            taken += new
            self._rows[self.place.row : self.place.row + len(new)] = [[]] * len(new)
            self.place = Place(self.place.window, self.place.row + len(new))
            if self.place.row >= len(self._rows):
                self.place, self._rows = Place(self.place.window + self._plan.lanes, 0), None
        counts, self._counts = self._counts, Counter()
        return taken, counts


def first_places(lanes: int) -> list[Place]:
    """Where all lanes begin."""
    return [Place(lane, 0) for lane in range(lanes)]
