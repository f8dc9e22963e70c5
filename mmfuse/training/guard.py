"""Numbers that are no longer numbers: a run stops before they reach the weights or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor

from mmfuse.errors import RunError

_SHOWN = 8

_ADVICE = "Lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at these samples"


class NonFiniteLossError(RunError):
    """A loss, gradient or weight became NaN or infinite. Raised before any checkpoint is overwritten."""


class StepSamples:
    """The samples of an optimizer step by micro-batch, with the loss of each, to name those that broke it."""

    def __init__(self) -> None:
        self._micro: list[tuple[Tensor, list[str]]] = []

    def add(self, loss: Tensor, keys: Iterable[str]) -> None:
        """Note one micro-batch: its loss, a scalar, and the keys of its samples."""
        self._micro.append((loss, list(keys)))

    def clear(self) -> None:
        """Forget the step."""
        self._micro = []

    def suspects(self) -> list[str]:
        """Keys of the micro-batches whose loss is not finite; if all losses are finite, of the whole step."""
        broken = [keys for loss, keys in self._micro if not bool(torch.isfinite(loss))]
        return [key for keys in broken or [keys for _, keys in self._micro] for key in keys]


def non_finite(trainer: Trainer, what: str, stage: str, samples: StepSamples) -> NonFiniteLossError:
    """The error for a step that broke. All ranks must call it: it gathers the samples of all of them."""
    own = samples.suspects()
    parts: list[Sequence[str]] = [own]
    if trainer.world_size > 1:
        parts = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(parts, own)
    names = [key for part in parts for key in part]
    more = ", …" if len(names) > _SHOWN else ""
    return NonFiniteLossError(
        f"{what} at step {trainer.global_step}, stage {stage!r}; the last checkpoint is untouched. "
        f"Samples of the step: {', '.join(names[:_SHOWN])}{more}. {_ADVICE}"
    )


def gradients_are_finite(trainer: Trainer, parameters: Iterable[Tensor]) -> bool:
    """Whether all gradients on all ranks are finite: one number a rank.

    Under a gradient scaler (fp16) infinite gradients are part of its search for a scale, and it leaves out their steps.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return True
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return bool(trainer.strategy.reduce_boolean_decision(bool(torch.isfinite(norm)), all=True))


def refuse_non_finite_weights(trainer: Trainer, module: torch.nn.Module) -> None:
    """Keep weights that are NaN or infinite out of the checkpoint that is about to be written.

    Raises:
        NonFiniteLossError: on all ranks, naming the first such weight of this rank's share.
    """
    broken = next((name for name, weight in module.named_parameters() if not _is_finite(weight.detach())), None)
    if not trainer.strategy.reduce_boolean_decision(broken is None, all=True):
        raise NonFiniteLossError(
            f"the weights {broken or 'of another rank'} are no longer finite after step {trainer.global_step}; "
            f"no checkpoint was written, the one before is untouched. Lower the learning rate, or clip gradients "
            "(trainer.gradient_clip_val)"
        )


def _is_finite(weight: Any) -> bool:
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return bool(torch.isfinite(local).all())
