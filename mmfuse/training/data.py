"""Lightning data modules: users' own sources, and the handwriting demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from mmfuse.data import BatchPlan, MixtureDataset, Sample, Source, StagePlan, encode_sample, open_source
from mmfuse.data.handwriting_shards import Handwriting, write_shards
from mmfuse.errors import ConfigError, unknown
from mmfuse.models import MultimodalProcessor
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

    def open(self) -> Source:
        return open_source(self.path, images=self.images)


class PlannedLoader(DataLoader[Any]):
    """A DataLoader whose position follows from the trainer's step, so that there is no state to save.

    Lightning takes a loader without these two methods for one that starts again from the first sample.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


@dataclass(frozen=True)
class TrainingCollate:
    """Samples to the batch that `MultimodalModule` takes: the network's inputs, and `keys` to name samples by."""

    processor: MultimodalProcessor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        encoded = [encode_sample(sample, self.processor.encoder) for sample in samples]
        return {**self.processor.collate(encoded), "keys": [sample.key for sample in samples]}


class MultimodalData(LightningDataModule):
    """Sources of training, validation and test samples.

    Args:
        stages: which sources each stage mixes, linked from the config's top level.
        train: training sources by name; a value is a path or a `SourceSpec`.
        val: validation source.
        test: source of held-out questions.
        batch_size: samples in a training batch, on each device.
        eval_batch_size: samples in a batch of validation and test.
        num_workers: processes that read and encode; 0 does it in the main one.
        seed: of the order of samples.
    """

    def __init__(
        self,
        stages: list[Stage],
        train: dict[str, SourceSpec],
        val: SourceSpec | None = None,
        test: SourceSpec | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {size}")
        self.stages = list(stages)
        self.specs: dict[str, SourceSpec] = dict(train)
        self.held_out: dict[str, SourceSpec | None] = {"val": val, "test": test}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.sources: dict[str, Source] = {}
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
        assert isinstance(processor, MultimodalProcessor)
        return processor

    def setup(self, stage: str | None = None) -> None:
        wanted: dict[str, SourceSpec | None] = dict(self.held_out)
        if stage in (None, "fit"):
            wanted |= {name: self.specs[name] for part in self.stages for name in part.data}
        for name, spec in wanted.items():
            if spec is not None and name not in self.sources:
                self.sources[name] = spec.open()

    def plan(self, *, accumulate: int = 1, rank: int = 0, world: int = 1, start: int = 0) -> BatchPlan:
        """Which sample goes into which batch, from batch `start` on."""
        names = sorted({name for stage in self.stages for name in stage.data})
        return BatchPlan(
            {name: len(self.sources[name]) for name in names},
            [StagePlan(stage.data, stage.steps * accumulate) for stage in self.stages],
            self.batch_size,
            seed=self.seed,
            rank=rank,
            world=world,
            start=start,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        accumulate = trainer.accumulate_grad_batches
        plan = self.plan(
            accumulate=accumulate,
            rank=trainer.global_rank,
            world=trainer.world_size,
            start=trainer.global_step * accumulate,
        )
        return PlannedLoader(
            MixtureDataset({name: self.sources[name] for name in plan.sizes}),
            batch_sampler=plan,
            collate_fn=TrainingCollate(self.processor),
            num_workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if "val" not in self.sources:
            return []
        return self._held_out_loader("val", TrainingCollate(self.processor))

    def test_dataloader(self) -> DataLoader[Any]:
        if "test" not in self.sources:
            raise ConfigError("data.test is not set: there are no held-out questions to answer")
        return self._held_out_loader("test", list)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Samples that are still to be encoded hold no tensors.
        return batch if isinstance(batch, list) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _held_out_loader(self, name: str, collate: Any) -> DataLoader[Any]:
        assert self.trainer is not None
        source = self.sources[name]
        own = range(self.trainer.global_rank, len(source), self.trainer.world_size)
        shared = {"collate_fn": collate, "num_workers": self.num_workers}
        # By keyword: Lightning makes the loader of `predict` anew.
        return DataLoader(Subset(source, own), batch_size=self.eval_batch_size, **shared)  # type: ignore[arg-type]

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
        batch_size: samples in a training batch, on each device.
        eval_batch_size: samples in a batch of validation and test.
        num_workers: processes that read and encode; 0 does it in the main one.
        seed: of the order of samples.
    """

    def __init__(
        self,
        stages: list[Stage],
        scenes: Handwriting = Handwriting(),  # noqa: B008  (frozen)
        cache: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        folder = (Path(cache) if cache is not None else cache_directory()) / f"handwriting-{scenes.fingerprint()}"
        parts = {part: SourceSpec(str(folder / f"{part}-*.tar")) for part in ("align", "instruct", "val", "test")}
        super().__init__(
            stages,
            train={name: parts[name] for name in ("align", "instruct")},
            val=parts["val"],
            test=parts["test"],
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.folder = folder
        self.scenes = scenes

    def prepare_data(self) -> None:
        write_shards(self.folder, self.scenes)
