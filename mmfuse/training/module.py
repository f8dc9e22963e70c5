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
from mmfuse.data.stream import NO_INPUTS
from mmfuse.errors import ConfigError
from mmfuse.eval.questions import Prediction, answer_questions
from mmfuse.fusion import IGNORED_LABEL, Fusion, build_fusion
from mmfuse.fusion.base import base_visibility
from mmfuse.kernels import Call, check_backend
from mmfuse.models import NetworkSpec, build_network
from mmfuse.models.decoder import supervised_rows
from mmfuse.models.lora import (
    AdapterPlan,
    AdapterSpec,
    attach_adapter,
    base_fingerprint,
    check_trained_state,
    plan_adapter,
    trained_state,
)
from mmfuse.sequence import Modality, TokenMap
from mmfuse.training.guard import StepSamples, gradients_are_finite, non_finite, refuse_non_finite_weights
from mmfuse.training.sharding import shard_network
from mmfuse.training.stages import Schedule, Stage
from mmfuse.training.streaming import StreamState

MODALITIES = tuple(modality.name.lower() for modality in Modality)


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
        adapter: tune the parts that it names by an adapter (LoRA and its kin) instead of in full. Checkpoints then hold
            what trains, and a mark of the weights that it stands on.
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
        adapter: AdapterSpec | None = None,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ConfigError(f"model.ema_decay must lie between 0 and 1, got {ema_decay}")
        if ema_decay is not None and adapter is not None:
            raise ConfigError("model.ema_decay averages all weights, and model.adapter keeps most of them: drop one")
        self.schedule = Schedule(stages)
        self.stage_fusions = [_stage_fusion(stage) for stage in stages]
        self.optimizer_spec = optimizer
        self.ema_decay = ema_decay
        self.max_new_tokens = max_new_tokens
        #: The whole model that this one begins as, if it is one.
        self.pretrained: str | None = (network.vlm or {}).get("pretrained")
        self.network, self.processor = build_network(network, _load_tokenizer(tokenizer))
        for part, module in self.network.parts().items():
            module.requires_grad_(part in self.schedule.trained_parts())
        self.adapter = adapter
        self.plan: AdapterPlan | None = None
        if adapter is not None:
            self.plan = plan_adapter(self.network, adapter, self.schedule.trained_parts())
            self.base = base_fingerprint(self.network, self.plan)
            attach_adapter(self.network, adapter, self.plan)
            self.strict_loading = False  # what stays is not in the checkpoint; `on_load_checkpoint` is as strict
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
        self._samples = StepSamples()
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

    def configure_model(self) -> None:
        """Cut the network over the ranks, under a strategy that does so."""
        if self.device_mesh is not None:
            if self.ema_decay is not None:
                raise ConfigError("model.ema_decay needs whole weights on every rank; trainer.strategy fsdp2 has none")
            if self.plan is not None:
                raise ConfigError("model.adapter is not tuned under trainer.strategy fsdp2 yet: use ddp")
            shard_network(self.network, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[Callback]:
        # Buffers are copied, not averaged: an average of integer buffers would be truncated.
        average = [] if self.ema_decay is None else [EMAWeightAveraging(decay=self.ema_decay, use_buffers=False)]
        return [StreamState(), *average]

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

    # Checkpoints of an adapter

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_non_finite_weights(self.trainer, self.network)
        if self.plan is not None:
            checkpoint["state_dict"] = trained_state(self, checkpoint["state_dict"])
            checkpoint["base"] = self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.plan is None:
            if "base" in checkpoint:
                raise ConfigError("the checkpoint is of an adapter, and the config has no model.adapter")
            return
        check_trained_state("checkpoint", self, checkpoint["state_dict"])
        if checkpoint.get("base") != self.base:
            raise ConfigError(
                "the adapter in the checkpoint was trained on other weights than those that the config loads; on these "
                "it means nothing"
            )

    # Training

    def on_fit_start(self) -> None:
        in_half = self.adapter is not None and self.adapter.base_dtype == "bfloat16"
        precision = str(self.trainer.precision)
        if in_half and precision not in ("bf16-mixed", "bf16-true"):
            raise ConfigError(
                f"model.adapter.base_dtype is bfloat16; set trainer.precision to bf16-mixed (it is {precision})"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        index, stage, step = self.schedule.at(self.global_step)
        earlier = any(before.trains("fusion") for before in self.schedule.stages[:index])
        if index and step == 0 and stage.trains("fusion") and not earlier:
            # What earlier stages taught the connector is where the strategy's own projectors begin.
            self.network.fusion.start_from(dict(self.network.connectors.items()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The *sum* of the loss over the supervised tokens; `on_before_optimizer_step` divides by their number."""
        index, _, _ = self.schedule.at(self.global_step)
        inputs = self._inputs(batch)
        output = self.network(**inputs, return_logits=False, fusion=self.stage_fusions[index])
        total = output.loss * output.supervised
        tokens = inputs["tokens"]
        counts = torch.bincount(tokens.modality[~tokens.is_pad], minlength=len(MODALITIES))
        step = torch.cat([torch.stack([total.detach(), output.supervised]), counts]).to(self._sums)
        self._sums = self._sums + step
        self._samples.add(total.detach(), batch["keys"])
        # Lightning divides by the number of accumulated batches; our own division is by tokens.
        return total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        sums = self._all_reduce(self._sums)
        loss, supervised = float(sums[0]), int(sums[1])
        self._sums = torch.zeros_like(self._sums)
        mean = loss / max(1, supervised)
        _, stage, _ = self.schedule.at(self.global_step)
        if not torch.isfinite(sums[0]):
            raise non_finite(self.trainer, f"loss is {loss}", stage.name, self._samples)
        # DDP and FSDP average gradients over ranks, and we want their sum over tokens.
        scale = self.trainer.world_size / max(1, supervised)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not stage.trains(group["part"]):
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.mul_(scale)
        if not gradients_are_finite(self.trainer, (p for group in optimizer.param_groups for p in group["params"])):
            raise non_finite(
                self.trainer, f"loss is {mean:.6g}, and a gradient is not finite", stage.name, self._samples
            )
        self._samples.clear()
        tokens = {name: int(count) for name, count in zip(MODALITIES, sums[2:].tolist(), strict=True)}
        self.last_step = StepTotals(mean, supervised, tokens)

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the network takes of a batch."""
        return self.network.prepared({name: value for name, value in batch.items() if name not in NO_INPUTS})

    def _all_reduce(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()

    # Validation: one forward pass under teacher forcing

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros_like(self._validated)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        inputs = self._inputs(batch)
        output = self.network(**inputs)
        rows, targets = supervised_rows(inputs["tokens"], batch["labels"], IGNORED_LABEL)
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
