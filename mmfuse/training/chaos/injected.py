"""Callbacks that make a run fail from inside: sources that misbehave, and weights that are no numbers.

They wrap the training sources of the data module, so that everything behind reading is the real thing: decoding,
quarantine, retries, workers, checkpoints.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mmfuse.data import Sample, Source, open_source
from mmfuse.data.remote import RemoteCache
from mmfuse.data.sources import ShardSource
from mmfuse.data.sources.undecoded import Undecoded, decoded
from mmfuse.data.tools.pack import MANIFEST, pack_source
from mmfuse.errors import DataError


class WrappedSource:
    """A source as it is; subclasses change what reading does."""

    def __init__(self, source: Source) -> None:
        self.source, self.name = source, source.name
        self.reads = 0

    @property
    def parts(self) -> Sequence[int]:
        return self.source.parts

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def __getitem__(self, index: int) -> Sample:
        return decoded(self.read(index))

    def read(self, index: int) -> Sample:
        self.reads += 1
        return self.source.read(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class FlakySource(WrappedSource):
    """Every so manieth sample fails with EIO when it, or its first medium, is read for the first time."""

    def __init__(self, source: Source, every: int) -> None:
        super().__init__(source)
        self.every, self.failed = every, set[tuple[str, int]]()

    def read(self, index: int) -> Sample:
        self._fail_once("record", index, index % self.every == 0)
        sample = super().read(index)
        if not sample.images or not isinstance(sample.images[0], Undecoded):
            return sample
        first = sample.images[0]

        def read_medium() -> bytes:
            self._fail_once("medium", index, index % self.every == 1)
            return first.read()

        return replace(sample, images=(replace(first, read=read_medium), *sample.images[1:]))

    def _fail_once(self, what: str, index: int, due: bool) -> None:
        if due and (what, index) not in self.failed:
            self.failed.add((what, index))
            raise OSError(errno.EIO, "Input/output error")


class DeadSource(WrappedSource):
    """From some read on, all fail with EIO."""

    def __init__(self, source: Source, after: int) -> None:
        super().__init__(source)
        self.after = after

    def read(self, index: int) -> Sample:
        if self.reads >= self.after:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(index)


class StalledSource(WrappedSource):
    """From some read on, none returns."""

    def __init__(self, source: Source, after: int) -> None:
        super().__init__(source)
        self.after = after

    def read(self, index: int) -> Sample:
        if self.reads >= self.after:
            time.sleep(1e6)
        return super().read(index)


class DamagedSource(WrappedSource):
    """Every so manieth sample is bad: its first image cut off, no image at all, or missing; in turn."""

    def __init__(self, source: Source, every: int) -> None:
        super().__init__(source)
        self.every = every

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        if index % self.every:
            return sample
        kind = index // self.every % 3
        if kind == 2 or not sample.images or not isinstance(sample.images[0], Undecoded):
            if not sample.images:
                raise DataError(f"{sample.key}: planted: the record cannot be read")
            return replace(sample, images=sample.images[1:])
        first = sample.images[0]
        data = first.read()
        broken = data[: len(data) // 2] if kind == 0 else b"no image"
        return replace(sample, images=(replace(first, read=lambda: broken), *sample.images[1:]))


class FirstSamples(WrappedSource):
    """The first samples of a source."""

    def __init__(self, source: Source, count: int) -> None:
        super().__init__(source)
        self.count = min(count, len(source))

    @property
    def parts(self) -> Sequence[int]:
        return [self.count]

    def __len__(self) -> int:
        return self.count


class SourceFault(Callback):
    """Replaces the training sources of a fit."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            for name in data.train_names():
                if name in data.sources:
                    data.sources[name] = self.replaced(name, data.sources[name])

    def replaced(self, name: str, source: Source) -> Source:
        """What is read instead of a source."""
        raise NotImplementedError


class FlakyReads(SourceFault):
    """See `FlakySource`."""

    def __init__(self, every: int) -> None:
        self.every = every

    def replaced(self, name: str, source: Source) -> Source:
        return FlakySource(source, self.every)


class DeadDisk(SourceFault):
    """See `DeadSource`."""

    def __init__(self, after: int) -> None:
        self.after = after

    def replaced(self, name: str, source: Source) -> Source:
        return DeadSource(source, self.after)


class StalledReads(SourceFault):
    """See `StalledSource`."""

    def __init__(self, after: int) -> None:
        self.after = after

    def replaced(self, name: str, source: Source) -> Source:
        return StalledSource(source, self.after)


class DamagedSamples(SourceFault):
    """See `DamagedSource`."""

    def __init__(self, every: int) -> None:
        self.every = every

    def replaced(self, name: str, source: Source) -> Source:
        return DamagedSource(source, self.every)


class OwnShards(SourceFault):
    """Trains on shards with the first samples of each source, which may be damaged from outside between two runs.

    Args:
        folder: gets a folder for each source.
        samples: of each source.
    """

    def __init__(self, folder: str, samples: int = 64) -> None:
        self.folder, self.samples = Path(folder), samples

    def replaced(self, name: str, source: Source) -> Source:
        own = self.folder / name
        if not own.exists():
            pack_source(FirstSamples(source, self.samples), own, per_shard=self.samples)
            (own / MANIFEST).unlink()  # as shards of other tools are: without checksums
        return open_source(own)


class RemoteShards(SourceFault):
    """Trains on what `OwnShards` wrote, fetched from a server: every source has a shard of the same name.

    Args:
        url: of the folder.
        cache: where the copies go.
    """

    def __init__(self, url: str, cache: str) -> None:
        self.url, self.cache = url, Path(cache)

    def replaced(self, name: str, source: Source) -> Source:
        return ShardSource(RemoteCache(self.cache).fetch([f"{self.url}/{name}/train-000000.tar"]), name=name)


class PoisonedWeight(Callback):
    """Makes a weight NaN before the step with this number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.fill_(float("nan"))
