"""The LightningModule: a network, its stages, and a loss that weighs every supervised token alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.errors import ConfigError, RunError
from mmfuse.eval.questions import Prediction, answer_questions
from mmfuse.fusion import IGNORED_LABEL, Fusion, build_fusion
from mmfuse.fusion.base import base_visibility
from mmfuse.kernels import Call, check_backend
from mmfuse.models import NetworkSpec, build_network
from mmfuse.models.decoder import supervised_rows
from mmfuse.sequence import Modality, TokenMap
from mmfuse.training.stages import Schedule, Stage

MODALITIES = tuple(modality.name.lower() for modality in Modality)


class NonFiniteLossError(RunError):
    """The loss became NaN or infinite. Raised before the optimizer steps, so no checkpoint holds the broken weights."""


@dataclass(frozen=True)
class AdamWSpec:
    """AdamW, as the papers use it; learning rates are those of the stages.

    Attributes:
        betas: decay of the running averages.
        eps: added to the denominator.
        weight_decay: of matrices; biases, norms and embeddings have none.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class StepTotals:
    """One optimizer step in numbers, summed over micro-batches and ranks.

    Attributes:
        loss: mean over the supervised tokens.
        supervised: how many there were.
        tokens: live tokens of each modality.
    """

    loss: float
    supervised: int
    tokens: Mapping[str, int]


class MultimodalModule(LightningModule):
    """Trains a `MultimodalLM` through stages.

    A part that no stage tunes is frozen for good. A part that only some stages tune keeps `requires_grad` throughout,
    because DDP does not synchronise parameters that are unfrozen after it has wrapped the model; in the other stages
    its gradients are dropped before the optimizer sees them.

    Args:
        network: the parts of the model.
        stages: what is trained when; the run's steps are the sum of theirs.
        tokenizer: folder or hub name of a tokenizer; by default the small one that is shipped.
        optimizer: settings of AdamW.
        ema_decay: keep an exponential moving average of the weights with this decay, validate and save it.
        gradient_checkpointing: recompute the decoder's activations in the backward pass.
        max_new_tokens: the longest answer in `test` and `predict`.
    """

    def __init__(
        self,
        network: NetworkSpec,
        stages: list[Stage],
        tokenizer: str | None = None,
        optimizer: AdamWSpec = AdamWSpec(),
        ema_decay: float | None = None,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 32,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ConfigError(f"model.ema_decay must lie between 0 and 1, got {ema_decay}")
        self.schedule = Schedule(stages)
        self.stage_fusions = [_stage_fusion(stage) for stage in stages]
        self.optimizer_spec = optimizer
        self.ema_decay = ema_decay
        self.max_new_tokens = max_new_tokens
        self.network, self.processor = build_network(network, _load_tokenizer(tokenizer))
        for part, module in self.network.parts().items():
            module.requires_grad_(part in self.schedule.trained_parts())
        if "fusion" not in self.schedule.trained_parts() and any(True for _ in self.network.fusion.parameters()):
            warnings.warn(
                f"{type(self.network.fusion).__name__} has parameters of its own and no stage tunes them: give "
                "`fusion` a learning rate in stages[].lr",
                stacklevel=2,
            )
        if gradient_checkpointing:
            self.network.activation_checkpointing_enable()
        self.last_step: StepTotals | None = None
        self._sums = torch.zeros(2 + len(MODALITIES), dtype=torch.float64)
        self._keys: list[str] = []
        self._validated = torch.zeros(4, dtype=torch.float64)

    def setup(self, stage: str) -> None:
        """Refuse a backend that cannot run on this device at all, before data are read.

        Raises:
            BackendError: with the reason, and the backends that can. What a mask forbids shows with the first batch.
        """
        text = self.network.config.text_config
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        device = self.trainer.strategy.root_device.type
        call = Call(heads, width, device=device, differentiable=stage == "fit")
        check_backend(self.network.config.attention_backend, base_visibility(TokenMap.from_layout([("text", 1)])), call)

    def configure_callbacks(self) -> list[Callback]:
        # Buffers are copied, not averaged: an average of integer buffers would be truncated.
        return [] if self.ema_decay is None else [EMAWeightAveraging(decay=self.ema_decay, use_buffers=False)]

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = []
        rates: list[Callable[[int], float]] = []
        for part in self.schedule.trained_parts():
            for decay, parameters in _by_decay(self.network.parts()[part]).items():
                if parameters:
                    weight_decay = self.optimizer_spec.weight_decay if decay else 0.0
                    groups.append({"params": parameters, "lr": 1.0, "weight_decay": weight_decay, "part": part})
                    rates.append(partial(self.schedule.learning_rate, part))
        optimizer = AdamW(groups, betas=self.optimizer_spec.betas, eps=self.optimizer_spec.eps)
        scheduler = {"scheduler": LambdaLR(optimizer, rates), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # Training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        index, stage, step = self.schedule.at(self.global_step)
        earlier = any(before.trains("fusion") for before in self.schedule.stages[:index])
        if index and step == 0 and stage.trains("fusion") and not earlier:
            # What earlier stages taught the connector is where the strategy's own projectors begin.
            self.network.fusion.start_from(dict(self.network.connectors.items()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The *sum* of the loss over the supervised tokens; `on_before_optimizer_step` divides by their number."""
        index, _, _ = self.schedule.at(self.global_step)
        inputs = {name: value for name, value in batch.items() if name != "keys"}
        output = self.network(**inputs, return_logits=False, fusion=self.stage_fusions[index])
        total = output.loss * output.supervised
        tokens = batch["tokens"]
        counts = torch.bincount(tokens.modality[~tokens.is_pad], minlength=len(MODALITIES))
        step = torch.cat([torch.stack([total.detach(), output.supervised]), counts]).to(self._sums)
        self._sums = self._sums + step
        self._keys += batch["keys"]
        # Lightning divides by the number of accumulated batches; our own division is by tokens.
        return total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        sums = self._all_reduce(self._sums)
        loss, supervised = float(sums[0]), int(sums[1])
        keys, self._keys, self._sums = self._keys, [], torch.zeros_like(self._sums)
        mean = loss / max(1, supervised)
        _, stage, _ = self.schedule.at(self.global_step)
        if not torch.isfinite(sums[0]):
            raise NonFiniteLossError(
                f"loss is {loss} at step {self.global_step}, stage {stage.name!r}; the last checkpoint is untouched. "
                f"Samples of the step: {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}. "
                "Lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at these samples"
            )
        # DDP and FSDP average gradients over ranks, and we want their sum over tokens.
        scale = self.trainer.world_size / max(1, supervised)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not stage.trains(group["part"]):
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.mul_(scale)
        tokens = {name: int(count) for name, count in zip(MODALITIES, sums[2:].tolist(), strict=True)}
        self.last_step = StepTotals(mean, supervised, tokens)

    def _all_reduce(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()

    # Validation: one forward pass under teacher forcing

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros_like(self._validated)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        inputs = {name: value for name, value in batch.items() if name != "keys"}
        output = self.network(**inputs)
        rows, targets = supervised_rows(batch["tokens"], batch["labels"], IGNORED_LABEL)
        wrong = torch.zeros_like(rows)
        wrong[rows] = output.logits[rows].argmax(-1) != targets
        right = (~wrong.any(1)).sum()
        step = torch.stack([output.loss * output.supervised, output.supervised, right, rows.any(1).sum()])
        self._validated = self._validated + step.to(self._validated)

    def on_validation_epoch_end(self) -> None:
        loss, supervised, right, samples = self._all_reduce(self._validated).tolist()
        scores = {"val/loss": loss / max(1, supervised), "val/exact_match": right / max(1, samples)}
        # `logger=False`: the metrics callback writes them into the row of their step.
        self.log_dict(scores, logger=False, prog_bar=False)

    # Answers, by generation

    def test_step(self, batch: list[Any], batch_idx: int) -> dict[str, list[Prediction]]:
        return {"seen": self._answer(batch, blind=False), "blind": self._answer(batch, blind=True)}

    def predict_step(self, batch: list[Any], batch_idx: int) -> list[Prediction]:
        return self._answer(batch, blind=False)

    def _answer(self, samples: list[Any], *, blind: bool) -> list[Prediction]:
        return answer_questions(
            self.network,
            self.processor,
            samples,
            batch_size=len(samples),
            max_new_tokens=self.max_new_tokens,
            blind=blind,
        )


def _load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    if name is None:
        return load_tokenizer()
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokenizer {name!r} cannot be loaded: {error}") from error
    return loaded


def _stage_fusion(stage: Stage) -> Fusion | None:
    if stage.fusion is None:
        return None
    fusion = build_fusion(stage.fusion)
    if any(True for _ in fusion.parameters()):
        raise ConfigError(
            f"stage {stage.name!r}: fusion {stage.fusion!r} has parameters of its own; name it in model.network"
        )
    return fusion


def _by_decay(module: torch.nn.Module) -> dict[bool, list[torch.nn.Parameter]]:
    """Parameters with and without weight decay: matrices have it, embeddings and vectors do not."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and id(parameter) not in embeddings].append(parameter)
    return groups
