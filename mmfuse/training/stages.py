"""Stages of a training run: what is trained, on what, with which fusion, for how many steps.

One fit runs all stages behind each other, so `global_step` and the `last` checkpoint mean the same thing throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmfuse.errors import ConfigError, check_keys

#: The parts of a model that have a learning rate of their own, see `MultimodalLM.parts`.
PARTS = ("encoder", "connector", "decoder", "fusion")


@dataclass(frozen=True)
class Stage:
    """One stage, such as alignment or instruction tuning.

    Attributes:
        name: for logs and plots.
        steps: optimizer steps.
        data: weight of each training source in the mixture; they need not sum to 1.
        lr: peak learning rate of each part; a part that is absent or 0 is frozen in this stage.
        fusion: a strategy without parameters to use instead of the model's own, such as `causal` for alignment on
            captions (AKI, LLaVA); by default the model's own.
        warmup: steps over which the learning rate rises linearly from 0.
        decay: share of the steps, at the stage's end, over which the learning rate falls along a cosine; between
            warm-up and decay it stays at its peak. 1 is the plain cosine that begins after warm-up.
        final_lr: what the cosine ends at, as a share of the peak.
    """

    name: str
    steps: int
    data: dict[str, float]
    lr: dict[str, float]
    fusion: str | None = None
    warmup: int = 0
    decay: float = 1.0
    final_lr: float = 0.1

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        check_keys(f"{where}, lr", self.lr, PARTS)
        if self.steps < 1:
            raise ConfigError(f"{where}: steps must be at least 1, got {self.steps}")
        if not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"{where}: warmup must lie in 0..{self.steps} (its steps), got {self.warmup}")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"{where}: decay is a share of the steps, 0..1, got {self.decay}")
        if not 0 <= self.final_lr <= 1:
            raise ConfigError(f"{where}: final_lr is a share of the peak, 0..1, got {self.final_lr}")
        if any(rate < 0 for rate in self.lr.values()) or not any(self.lr.values()):
            raise ConfigError(f"{where}: learning rates must be 0 or more, and one of them positive, got {self.lr}")
        if any(weight < 0 for weight in self.data.values()) or not any(self.data.values()):
            raise ConfigError(f"{where}: weights must be 0 or more, and one of them positive, got {self.data}")

    def trains(self, part: str) -> bool:
        """Whether `part` is tuned in this stage."""
        return self.lr.get(part, 0.0) > 0

    def learning_rate(self, part: str, step: int) -> float:
        """The learning rate of `part` at the stage's own `step`, counted from 0."""
        peak = self.lr.get(part, 0.0)
        if step < self.warmup:
            return peak * (step + 1) / (self.warmup + 1)
        start = max(self.warmup, round((1 - self.decay) * self.steps))
        progress = (step - start) / max(1, self.steps - start)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return peak * (self.final_lr + (1 - self.final_lr) * cosine)


@dataclass(frozen=True)
class Schedule:
    """All stages in their order."""

    stages: Sequence[Stage]
    starts: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("`stages` is empty: a fit needs at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(f"stages must have different names, got {', '.join(names)}")
        starts = [sum(stage.steps for stage in self.stages[:index]) for index in range(len(self.stages))]
        object.__setattr__(self, "starts", starts)

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[int, Stage, int]:
        """Index of the stage that global `step` (from 0) belongs to, the stage, and the step inside it.

        Steps behind the last stage belong to it: schedulers look one step ahead.
        """
        index = max(i for i, start in enumerate(self.starts) if start <= max(step, 0))
        return index, self.stages[index], step - self.starts[index]

    def learning_rate(self, part: str, step: int) -> float:
        """The learning rate of `part` at global `step`."""
        _, stage, own_step = self.at(step)
        return stage.learning_rate(part, own_step)

    def trained_parts(self) -> list[str]:
        """The parts that some stage tunes."""
        return [part for part in PARTS if any(stage.trains(part) for stage in self.stages)]

    def starts_by_name(self) -> list[tuple[str, int]]:
        """Name and first step of each stage, for plots."""
        return [(stage.name, start) for stage, start in zip(self.stages, self.starts, strict=True)]
