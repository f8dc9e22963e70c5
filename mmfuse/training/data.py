"""Lightning data modules: users' own sources, and the handwriting demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from mmfuse.data import Plan, Sample, Source, StagePlan, StreamLoader, encode_sample, open_source
from mmfuse.data.decoders import DEFAULT_BUDGET, Budget
from mmfuse.data.handwriting_shards import Handwriting, write_shards
from mmfuse.data.loader import StreamProgress
from mmfuse.data.quarantine import QUARANTINE, Quarantine
from mmfuse.data.remote import RemoteSettings
from mmfuse.data.stream import BatchStream, Encoding, StreamSettings
from mmfuse.errors import ConfigError, unknown
from mmfuse.fusion import IGNORED_LABEL
from mmfuse.models import MultimodalProcessor
from mmfuse.models.adopt.processor import AdoptedProcessor
from mmfuse.paths import cache_directory
from mmfuse.training.stages import Stage


@dataclass(frozen=True)
class SourceSpec:
    """Where samples lie.

    Attributes:
        path: shards, a JSON or JSON Lines file, or a folder; see `mmfuse.data.open_source`.
        images: folder that image paths in a JSON file start from; by default the file's own.
    """

    path: str
    images: str | None = None

    def open(self, budget: Budget, remote: RemoteSettings) -> Source:
        return open_source(self.path, images=self.images, budget=budget, remote=remote)


@dataclass(frozen=True)
class TrainingCollate:
    """Samples to the batch that `MultimodalModule` takes: the network's inputs, and `keys` to name samples by."""

    processor: MultimodalProcessor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        encoded = [encode_sample(sample, self.processor.encoder) for sample in samples]
        return {**self.processor.collate(encoded), "keys": [sample.key for sample in samples]}


@dataclass(frozen=True)
class Share(Dataset[tuple[Sample, bool]]):
    """A rank's share of a source: every `world`-th sample from `rank` on, each with whether it counts.

    Ranks have equally many, as they wait for each other in every pass where weights are sharded: those that come out
    short end with a sample that does not count.
    """

    source: Source
    rank: int
    world: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.world)

    def __getitem__(self, index: int) -> tuple[Sample, bool]:
        number = index * self.world + self.rank
        return self.source[min(number, len(self.source) - 1)], number < len(self.source)


@dataclass(frozen=True)
class SharedCollate:
    """As `TrainingCollate`, of what a `Share` gives; what does not count is not supervised."""

    collate: TrainingCollate

    def __call__(self, pairs: Sequence[tuple[Sample, bool]]) -> dict[str, Any]:
        batch = self.collate([sample for sample, _ in pairs])
        batch["labels"][[not counts for _, counts in pairs]] = IGNORED_LABEL
        return batch


class MultimodalData(LightningDataModule):
    """Sources of training, validation and test samples.

    Args:
        stages: which sources each stage mixes, linked from the config's top level.
        train: training sources by name; a value is a path or a `SourceSpec`.
        val: validation source.
        test: source of held-out questions.
        stream: how training samples become batches, apart from `batch_size`.
        batch_size: rows of a training batch, on each device: samples, or with `stream.pack_to` packed rows.
        eval_batch_size: samples in a batch of validation and test.
        num_workers: processes that read and encode; 0 does it in the main one.
        seed: of the order of samples.
        budget: how large a file of any source may be, checked before it is decoded.
        remote: for sources behind URLs: where these may lead, and how much the cache may hold.
    """

    def __init__(
        self,
        stages: list[Stage],
        train: dict[str, SourceSpec],
        val: SourceSpec | None = None,
        test: SourceSpec | None = None,
        stream: StreamSettings = StreamSettings(),  # noqa: B008  (frozen)
        batch_size: int = 32,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        budget: Budget = DEFAULT_BUDGET,
        remote: RemoteSettings = RemoteSettings(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        if eval_batch_size < 1:
            raise ConfigError(f"data.eval_batch_size must be at least 1, got {eval_batch_size}")
        self.stages = list(stages)
        self.specs: dict[str, SourceSpec] = dict(train)
        self.held_out: dict[str, SourceSpec | None] = {"val": val, "test": test}
        stream.check(batch_size)
        self.stream = stream
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.budget, self.remote = budget, remote
        self.sources: dict[str, Source] = {}
        self.progress: StreamProgress | None = None
        self._restored: dict[str, Any] | None = None
        for stage in self.stages:
            for name in stage.data:
                if name not in self.train_names():
                    raise ConfigError(f"stage {stage.name!r}: {unknown('training source', name, self.train_names())}")

    def train_names(self) -> list[str]:
        """The training sources that stages may name."""
        return list(self.specs)

    @property
    def processor(self) -> MultimodalProcessor:
        assert self.trainer is not None
        processor = self.trainer.lightning_module.processor
        assert isinstance(processor, MultimodalProcessor | AdoptedProcessor)
        return cast(MultimodalProcessor, processor)

    def setup(self, stage: str | None = None) -> None:
        wanted: dict[str, SourceSpec | None] = dict(self.held_out)
        if stage in (None, "fit"):
            wanted |= {name: self.specs[name] for name in self._mixed()}
        for name, spec in wanted.items():
            if spec is not None and name not in self.sources:
                self.sources[name] = spec.open(self.budget, self.remote)

    def _mixed(self) -> list[str]:
        return sorted({name for stage in self.stages for name in stage.data})

    # Training batches

    def plan(self, per_step: int = 1) -> Plan:
        """Which samples each window of the run holds.

        Args:
            per_step: batches of an optimizer step, of all ranks together.
        """
        return Plan(
            {name: self.sources[name].parts for name in self._mixed()},
            [StagePlan(stage.data, stage.steps * per_step) for stage in self.stages],
            window=self.stream.samples(self.batch_size),
            seed=self.seed,
            lanes=self.stream.lanes,
            window_is_batch=self.stream.window_is_batch,
        )

    def encoding(self, processor: MultimodalProcessor, quarantine: Path | None = None) -> Encoding:
        """What makes batches of drawn samples.

        Args:
            processor: encodes samples.
            quarantine: the file that samples are written down in that cannot be used.
        """
        sources = {name: self.sources[name] for name in self._mixed()}
        bad = Quarantine(quarantine, self.stream.bad_samples)
        return Encoding(sources, processor, self.stream, self.batch_size, self.seed, bad)

    def train_dataloader(self) -> StreamLoader:
        trainer = self.trainer
        assert trainer is not None
        accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
        plan = self.plan(per_step=accumulate * world)
        self.progress = StreamProgress(self.made_for(accumulate * world), plan.lanes, accumulate * world)
        if self._restored is not None:
            changes = self.stream.allow_changes
            self.progress.load_state_dict(self._restored, main=trainer.is_global_zero, changed_data=changes)
        if self.progress.steps != trainer.global_step:
            raise ConfigError(
                f"the checkpoint is of step {trainer.global_step}, its data state of step {self.progress.steps}: an "
                "older version made it, or another data module; start a new run from its weights"
            )
        first = trainer.global_step * accumulate * world
        lanes = self.progress.places(plan.stage_of(first)) if first < len(plan) else None
        stream = BatchStream(
            plan,
            self.encoding(self.processor, Path(trainer.default_root_dir) / QUARANTINE),
            rank=trainer.global_rank,
            world=world,
            workers=self.num_workers,
            start=trainer.global_step * accumulate,
            lanes=lanes,
        )
        return StreamLoader(
            stream,
            workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            timeout=self.stream.timeout,
        )

    def made_for(self, per_step: int) -> dict[str, Any]:
        """What the order of samples depends on; see `StreamSettings.order_settings`."""
        sources = {f"the data of {name}": self.sources[name].fingerprint()[:16] for name in self._mixed()}
        return {**sources, **self.stream.order_settings(self.batch_size, per_step), "data.seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """What was trained on, of all ranks together; every rank must call it, as for every save of Lightning's."""
        if self.progress is None:
            return {}
        own = self.progress.own_state()
        ranks: list[Any] = [own]
        if self.trainer is not None and self.trainer.world_size > 1:
            ranks = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        return self.progress.state_dict(ranks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict) or None

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if "val" not in self.sources:
            return []
        assert self.trainer is not None
        share = Share(self.sources["val"], self.trainer.global_rank, self.trainer.world_size)
        return self._held_out_loader(share, SharedCollate(TrainingCollate(self.processor)))

    def test_dataloader(self) -> DataLoader[Any]:
        if "test" not in self.sources:
            raise ConfigError("data.test is not set: there are no held-out questions to answer")
        assert self.trainer is not None
        source = self.sources["test"]
        own = range(self.trainer.global_rank, len(source), self.trainer.world_size)
        return self._held_out_loader(Subset(source, own), list)  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Samples that are still to be encoded hold no tensors.
        return batch if isinstance(batch, list) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _held_out_loader(self, samples: Dataset[Any], collate: Any) -> DataLoader[Any]:
        shared = {"collate_fn": collate, "num_workers": self.num_workers}
        # By keyword: Lightning makes the loader of `predict` anew.
        return DataLoader(samples, batch_size=self.eval_batch_size, **shared)

    def fingerprints(self) -> dict[str, str]:
        """A hash of each opened source, for provenance."""
        return {name: source.fingerprint() for name, source in sorted(self.sources.items())}


class HandwritingData(MultimodalData):
    """The demo: scenes of real handwritten digits and questions about them, written once into a cache folder.

    The training sources are called `align` (captions) and `instruct` (dialogues).

    Args:
        stages: which sources each stage mixes, linked from the config's top level.
        scenes: what is written.
        cache: folder for the shards; by default `$MMFUSE_CACHE`, or `mmfuse` in the user's cache folder.
        stream: how training samples become batches, apart from `batch_size`.
        batch_size: rows of a training batch, on each device: samples, or with `stream.pack_to` packed rows.
        eval_batch_size: samples in a batch of validation and test.
        num_workers: processes that read and encode; 0 does it in the main one.
        seed: of the order of samples.
        budget: how large a file may be, checked before it is decoded.
    """

    def __init__(
        self,
        stages: list[Stage],
        scenes: Handwriting = Handwriting(),  # noqa: B008  (frozen)
        cache: str | None = None,
        stream: StreamSettings = StreamSettings(),  # noqa: B008  (frozen)
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        budget: Budget = DEFAULT_BUDGET,
    ) -> None:
        folder = (Path(cache) if cache is not None else cache_directory()) / f"handwriting-{scenes.fingerprint()}"
        parts = {part: SourceSpec(str(folder / f"{part}-*.tar")) for part in ("align", "instruct", "val", "test")}
        super().__init__(
            stages,
            train={name: parts[name] for name in ("align", "instruct")},
            val=parts["val"],
            test=parts["test"],
            stream=stream,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            budget=budget,
        )
        self.folder = folder
        self.scenes = scenes

    def prepare_data(self) -> None:
        write_shards(self.folder, self.scenes)
