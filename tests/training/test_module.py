"""What an optimizer step does: every supervised token weighs the same, frozen parts stay, a NaN stops the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mmfuse.data import Sample
from mmfuse.errors import ConfigError
from mmfuse.fusion import Causal, ModalityMutual
from mmfuse.models import NetworkSpec
from mmfuse.training.checkpoints import AtomicCheckpointIO, checkpoint_callbacks, read_checkpoint
from mmfuse.training.data import TrainingCollate
from mmfuse.training.guard import NonFiniteLossError
from mmfuse.training.module import AdamWSpec, MultimodalModule
from mmfuse.training.stages import Stage

ALL = {"encoder": 1e-2, "connector": 1e-2, "decoder": 1e-2}


def stage(steps: int = 1, lr: dict[str, float] | None = None, name: str = "s", **rest: Any) -> Stage:
    return Stage(name=name, steps=steps, data={"a": 1.0}, lr=ALL if lr is None else lr, **rest)


@pytest.fixture
def spec(settings: dict[str, Any]) -> NetworkSpec:
    return NetworkSpec(**settings["model"]["network"])


def sample(number: int, question: str, answer: str, image: bool = True) -> Sample:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
    text = ("<image>" if image else "") + question
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
    return Sample(f"sample-{number}", (pixels,) if image else (), messages, None, {})


SHORT = [sample(0, "Which?", "7"), sample(1, "How many fives are there?", "2")]
LONG = [sample(2, "Read it.", "35 71 20 44 81"), sample(3, "Read all digits.", "00 12 99")]
TEXT_ONLY = [sample(4, "What is 1 + 1?", "2 2 2", image=False)]


def batches_of(module: MultimodalModule, batches: Sequence[Sequence[Sample]]) -> DataLoader[Any]:
    collate = TrainingCollate(module.processor)
    return DataLoader([list(samples) for samples in batches], batch_size=None, collate_fn=collate)  # type: ignore[arg-type]


def fit(module: MultimodalModule, batches: Sequence[Sequence[Sample]], **settings: Any) -> Trainer:
    """Train on `batches`, in their order, for as many steps as the stages have."""
    loader = batches_of(module, batches)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=module.schedule.steps,
        enable_model_summary=False,
        **{**quiet, **settings},
    )
    trainer.fit(module, train_dataloaders=loader)
    return trainer


class Recording(MultimodalModule):
    """Keeps the gradients that the optimizer is about to see."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.seen = {
            name: None if value.grad is None else value.grad.clone() for name, value in self.network.named_parameters()
        }


def snapshot(module: MultimodalModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.network.named_parameters()}


def part_of(name: str) -> str:
    return {"encoders": "encoder", "connectors": "connector", "decoder": "decoder"}[name.split(".")[0]]


# Every supervised token weighs the same


@pytest.mark.parametrize(
    "batches",
    [[SHORT, LONG], [LONG, SHORT], [SHORT, LONG, TEXT_ONLY], [[SHORT[0]], [SHORT[1], *LONG]]],
    ids=["short first", "long first", "three with text only", "one and three"],
)
def test_accumulated_gradients_are_those_of_one_batch(spec: NetworkSpec, batches: list[list[Sample]]) -> None:
    module = Recording(spec, [stage()])
    whole = TrainingCollate(module.processor)([one for batch in batches for one in batch])
    keys = whole.pop("keys")
    expected = module.network.train()(**whole)
    expected.loss.backward()
    wanted = {name: value.grad.clone() for name, value in module.network.named_parameters()}
    module.zero_grad()

    fit(module, batches, accumulate_grad_batches=len(batches))
    assert module.last_step is not None
    assert module.last_step.loss == pytest.approx(expected.loss.item(), rel=1e-5)
    assert module.last_step.supervised == int(expected.supervised)
    images = sum(len(one.images) for batch in batches for one in batch)
    assert module.last_step.tokens["image"] == 4 * images
    assert module.last_step.tokens["text"] == int((~whole["tokens"].is_pad).sum()) - 4 * images
    assert len(keys) == sum(map(len, batches))
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(module.seen[name], value, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_batches_of_different_length_would_not_weigh_the_same_by_their_means(spec: NetworkSpec) -> None:
    """The test above can fail: the mean of two means is another number."""
    module = MultimodalModule(spec, [stage()])
    collate = TrainingCollate(module.processor)
    losses = []
    for samples in (SHORT, LONG, SHORT + LONG):
        batch = collate(samples)
        batch.pop("keys")
        losses.append(module.network(**batch).loss.item())
    assert abs((losses[0] + losses[1]) / 2 - losses[2]) > 1e-3


def test_batch_without_supervised_tokens_gives_zero_gradients(spec: NetworkSpec) -> None:
    unanswered = Sample("q", (), ({"role": "user", "content": "Which?"},), None, {})
    module = Recording(spec, [stage()])
    fit(module, [[unanswered]])
    assert module.last_step is not None and module.last_step.supervised == 0 and module.last_step.loss == 0.0
    assert all(value is None or not value.any() for value in module.seen.values())


# Stages


def test_part_that_no_stage_tunes_is_frozen_for_good(spec: NetworkSpec) -> None:
    stages = [stage(2, {"connector": 1e-2}, "a"), stage(2, {"connector": 1e-2, "decoder": 1e-2, "encoder": 0.0}, "b")]
    module = MultimodalModule(spec, stages, optimizer=AdamWSpec(weight_decay=0.5))
    frozen = {part_of(name) for name, value in module.network.named_parameters() if not value.requires_grad}
    assert frozen == {"encoder"}
    before = snapshot(module)
    fit(module, [SHORT, LONG, SHORT, LONG])
    for name, value in module.network.named_parameters():
        assert torch.equal(value, before[name]) == (part_of(name) == "encoder"), name


class BetweenStages(MultimodalModule):
    """Keeps the parameters before each step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.history = [*getattr(self, "history", []), snapshot(self)]


def test_frozen_parts_are_equal_to_the_bit_in_their_stage(spec: NetworkSpec) -> None:
    """Neither weight decay nor the optimizer's momentum of an earlier stage moves them."""
    only = [{"connector": 1e-2}, {"encoder": 1e-2, "decoder": 1e-2}, {"connector": 1e-2}]
    stages = [stage(2, lr, str(number)) for number, lr in enumerate(only)]
    module = BetweenStages(spec, stages, optimizer=AdamWSpec(weight_decay=0.5))
    fit(module, [SHORT, LONG] * 3)
    states = [*module.history, snapshot(module)]
    for number, lr in enumerate(only):
        for step in (2 * number, 2 * number + 1):
            for name, value in states[step].items():
                changed = not torch.equal(value, states[step + 1][name])
                assert changed == (part_of(name) in lr), (step, name)


def test_weight_decay_is_for_matrices_alone(spec: NetworkSpec) -> None:
    module = MultimodalModule(spec, [stage()], optimizer=AdamWSpec(weight_decay=0.5))
    groups = module.configure_optimizers()["optimizer"].param_groups
    names = {id(value): name for name, value in module.network.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    kept = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert "decoder.model.embed_tokens.weight" in kept
    assert "decoder.model.layers.0.self_attn.q_proj.weight" in decayed
    assert "decoder.lm_head.weight" in decayed
    assert all("norm" not in name and not name.endswith("bias") for name in decayed)


def test_each_part_follows_its_own_rate(spec: NetworkSpec) -> None:
    rates: list[dict[str, float]] = []

    class Watching(MultimodalModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            groups = self.trainer.optimizers[0].param_groups
            rates.append({group["part"]: group["lr"] for group in groups})

    stages = [
        stage(2, {"connector": 1e-2, "decoder": 1e-4}, "a", warmup=1),
        stage(2, {"encoder": 3e-3, "decoder": 2e-3}, "b", final_lr=0.5),
    ]
    module = Watching(spec, stages)
    fit(module, [SHORT, LONG] * 2)
    expected = [
        {"connector": 5e-3, "decoder": 5e-5, "encoder": 0.0},
        {"connector": 1e-2, "decoder": 1e-4, "encoder": 0.0},
        {"connector": 0.0, "decoder": 2e-3, "encoder": 3e-3},
        {"connector": 0.0, "decoder": 1.5e-3, "encoder": 2.25e-3},
    ]
    assert rates == [pytest.approx(row) for row in expected]


def test_stage_runs_under_its_own_fusion(spec: NetworkSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for strategy in (Causal, ModalityMutual):
        original = strategy.visibility

        def recorded(self: Any, tokens: Any, original: Any = original) -> Any:
            used.append(type(self).__name__)
            return original(self, tokens)

        monkeypatch.setattr(strategy, "visibility", recorded)
    module = MultimodalModule(spec, [stage(1, name="align", fusion="causal"), stage(2, name="instruct")])
    fit(module, [SHORT, LONG, SHORT])
    # A strategy may ask for its mask several times in a pass.
    assert list(dict.fromkeys(used)) == ["Causal", "ModalityMutual"]
    assert used.index("ModalityMutual") >= used.count("Causal")


def test_unknown_fusion_of_a_stage_is_named(spec: NetworkSpec) -> None:
    with pytest.raises(ConfigError, match=r"unknown fusion 'causl': did you mean 'causal'\?"):
        MultimodalModule(spec, [stage(fusion="causl")])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 99.0])
def test_decay_of_the_average_lies_inside_0_and_1(spec: NetworkSpec, decay: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.ema_decay must lie between 0 and 1"):
        MultimodalModule(spec, [stage()], ema_decay=decay)


def test_gradient_checkpointing_gives_the_same_gradients(spec: NetworkSpec) -> None:
    seen, passes = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = Recording(spec, [stage()], gradient_checkpointing=checkpointing)
        calls: list[int] = []
        module.network.decoder.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        fit(module, [SHORT + LONG])
        seen.append(module.seen)
        passes.append(len(calls))
    assert passes == [1, 2], "a checkpointed layer runs once more, in the backward pass"
    for name, value in seen[0].items():
        torch.testing.assert_close(seen[1][name], value, msg=name)


# Validation


def test_validation_counts_samples_whose_whole_answer_is_right(spec: NetworkSpec) -> None:
    module = MultimodalModule(spec, [stage()])
    collate = TrainingCollate(module.processor)
    batches = [collate(SHORT), collate(LONG)]
    inputs = [{name: value for name, value in batch.items() if name != "keys"} for batch in batches]
    with torch.no_grad():
        outputs = [module.network.eval()(**given) for given in inputs]
    # One sample is right, and another one but for its last token.
    for number, (given, output) in enumerate(zip(inputs, outputs, strict=True)):
        said = output.logits.argmax(-1)
        labels = given["labels"][:, 1:]
        agrees = labels.eq(-100) | labels.eq(said[:, :-1])
        assert not agrees.all(1).any(), "a random model is wrong everywhere"
        row = labels[0].ne(-100).nonzero().flatten()
        labels[0, row] = said[0, row]
        if number:
            labels[0, row[-1]] = (said[0, row[-1]] + 1) % 10
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(module, dataloaders=DataLoader(batches, batch_size=None), verbose=False)
    scores = trainer.callback_metrics
    assert float(scores["val/exact_match"]) == pytest.approx(1 / 4)
    with torch.no_grad():
        outputs = [module.network.eval()(**given) for given in inputs]
    supervised = sum(int(output.supervised) for output in outputs)
    loss = sum(float(output.loss) * int(output.supervised) for output in outputs) / supervised
    assert float(scores["val/loss"]) == pytest.approx(loss, rel=1e-5)


# A loss that is no number


BROKEN = "decoder.model.norm.weight"


class Poisoned(MultimodalModule):
    """A parameter breaks before the third step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2:
            with torch.no_grad():
                self.network.get_parameter(BROKEN).fill_(float("nan"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan_names_step_stage_and_samples(spec: NetworkSpec, accumulate: int) -> None:
    module = Poisoned(spec, [stage(1, name="align"), stage(4, name="instruct")])
    with pytest.raises(NonFiniteLossError) as raised:
        fit(module, [SHORT, LONG] * 5, accumulate_grad_batches=accumulate)
    message = str(raised.value)
    assert message.startswith("loss is nan at step 2, stage 'instruct'; the last checkpoint is untouched. ")
    keys = ["sample-0", "sample-1"] if accumulate == 1 else ["sample-0", "sample-1", "sample-2", "sample-3"]
    assert f"Samples of the step: {', '.join(keys)}. " in message


def test_nan_names_eight_samples_at_most(spec: NetworkSpec) -> None:
    module = Poisoned(spec, [stage(5)])
    many = [sample(number, "Which?", "7") for number in range(12)]
    with pytest.raises(NonFiniteLossError, match=r"sample-6, sample-7, …\. Lower"):
        fit(module, [many] * 5)


def test_nan_leaves_parameters_and_the_last_checkpoint(spec: NetworkSpec, tmp_path: Path) -> None:
    module = Poisoned(spec, [stage(6)])
    callbacks = checkpoint_callbacks(tmp_path, every_n_steps=1)
    plugins = [AtomicCheckpointIO()]
    with pytest.raises(NonFiniteLossError):
        fit(module, [SHORT, LONG] * 3, callbacks=callbacks, plugins=plugins, enable_checkpointing=True)
    held = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt", map_location="cpu")
    assert held["global_step"] == 2
    assert all(bool(value.isfinite().all()) for value in held["state_dict"].values())
    broken = {name for name, value in module.network.named_parameters() if not value.isfinite().all()}
    assert broken == {BROKEN}, "the optimizer made a step with gradients that are no numbers"
    MultimodalModule(spec, [stage(6)]).load_state_dict(held["state_dict"])


def test_a_strategys_projectors_start_from_the_connector_when_a_stage_begins_to_tune_them(spec: NetworkSpec) -> None:
    stages = [stage(3, name="align", fusion="naavit"), stage(1, {**ALL, "fusion": 1e-2}, name="instruct")]
    module = MultimodalModule(replace(spec, fusion="saisa"), stages)
    projectors = module.network.fusion.projectors["1"]["image"]
    taken: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            parts = (projectors, module.network.connectors["image"])
            taken.append(tuple({k: v.clone() for k, v in part.state_dict().items()} for part in parts))  # type: ignore[arg-type]

        on_before_optimizer_step = on_train_batch_start

    fit(module, [SHORT] * 4, callbacks=[Look()])
    same = [all(torch.equal(own[name], other[name]) for name in own) for own, other in taken]
    # Equal at first, left behind while the connector learns alone, and taken along where the second stage begins.
    assert same == [True, True, False, False, False, False, False, True]
    assert not torch.equal(projectors.state_dict()["projection.0.weight"], taken[-1][0]["projection.0.weight"])


def test_a_strategy_whose_parameters_no_stage_tunes_is_named(spec: NetworkSpec) -> None:
    with pytest.warns(UserWarning, match="GatedCrossAttention has parameters of its own and no stage tunes them"):
        MultimodalModule(replace(spec, fusion="cross_attention"), [stage()])


class OneMicroBatchBreaks(MultimodalModule):
    """The loss of the first micro-batch is no number, that of the second is."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        bad = batch["keys"][0] == "sample-0"
        if bad:
            with torch.no_grad():
                batch["pixel_values"] = batch["pixel_values"] * float("nan")
        return super().training_step(batch, batch_idx)


def test_only_samples_of_the_micro_batch_that_broke_are_named(spec: NetworkSpec) -> None:
    module = OneMicroBatchBreaks(spec, [stage(2)])
    with pytest.raises(NonFiniteLossError, match=r"Samples of the step: sample-0, sample-1\. Lower"):
        fit(module, [SHORT, LONG] * 2, accumulate_grad_batches=2)


class GradientBreaks(MultimodalModule):
    """The loss is finite and a gradient is not."""

    def on_after_backward(self) -> None:
        if self.global_step == 1:
            grad = self.network.get_parameter(BROKEN).grad
            assert grad is not None
            grad[0] = float("inf")


def test_gradient_that_is_not_finite_stops_the_run(spec: NetworkSpec) -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"and a gradient is not finite at step 1, stage 's'.*sample-2, sample-3"
    ):
        fit(GradientBreaks(spec, [stage(3)]), [SHORT, LONG, SHORT])


class WeightBreaks(MultimodalModule):
    """The optimizer itself makes a weight infinite, with all losses and gradients finite."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.global_step == 1:  # counted when this returns
            with torch.no_grad():
                self.network.get_parameter(BROKEN)[0] = float("inf")


def test_weights_that_are_not_finite_do_not_replace_the_checkpoint(spec: NetworkSpec, tmp_path: Path) -> None:
    callbacks = checkpoint_callbacks(tmp_path, every_n_steps=1)
    with pytest.raises(NonFiniteLossError, match=f"weights {BROKEN} are no longer finite after step 2; no checkpoint"):
        fit(
            WeightBreaks(spec, [stage(6)]),
            [SHORT] * 6,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=True,
        )
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1
