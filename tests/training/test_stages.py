"""Learning rates, and which stage a step belongs to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import ConfigError
from mmfuse.training.stages import PARTS, Schedule, Stage


def stage(**changes: Any) -> Stage:
    fields: dict[str, Any] = {"name": "s", "steps": 8, "data": {"a": 1.0}, "lr": {"decoder": 1.0}}
    return Stage(**{**fields, **changes})


def test_warm_up_and_cosine_by_hand() -> None:
    made = stage(steps=7, warmup=3, final_lr=0.2, lr={"decoder": 4.0})
    # Up by a quarter of the peak a step; then half a cosine from 4 over 4 steps, whose end at 0.8 comes one step later.
    expected = [1.0, 2.0, 3.0, 4.0, 3.531370849898476, 2.4, 1.268629150101524, 0.8]
    assert [made.learning_rate("decoder", step) for step in range(8)] == pytest.approx(expected, rel=1e-12)


def test_decay_over_the_last_steps_by_hand() -> None:
    made = stage(steps=10, warmup=2, decay=0.4, final_lr=0.5)
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.9267766952966369, 0.75, 0.5732233047033631, 0.5]
    assert [made.learning_rate("decoder", step) for step in range(11)] == pytest.approx(expected, rel=1e-12)
    constant = stage(steps=10, decay=0.0)
    assert [constant.learning_rate("decoder", step) for step in range(10)] == [1.0] * 10


def test_after_its_end_a_stage_stays_at_its_final_rate() -> None:
    made = stage(steps=4, final_lr=0.25)
    assert [made.learning_rate("decoder", step) for step in (4, 5, 100)] == pytest.approx([0.25] * 3)


def test_warm_up_over_all_steps_does_not_divide_by_zero() -> None:
    made = stage(steps=2, warmup=2, final_lr=0.5)
    assert [made.learning_rate("decoder", step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize("lr", [{"decoder": 1.0}, {"decoder": 1.0, "encoder": 0.0}])
def test_a_part_without_a_rate_or_with_zero_is_frozen(lr: dict[str, float]) -> None:
    made = stage(lr=lr, warmup=2)
    assert made.trains("decoder") and not made.trains("encoder")
    assert {made.learning_rate("encoder", step) for step in range(10)} == {0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "stage 's': steps must be at least 1, got 0"),
        ({"warmup": 9}, r"stage 's': warmup must lie in 0\.\.8 \(its steps\), got 9"),
        ({"warmup": -1}, r"stage 's': warmup must lie in 0\.\.8 \(its steps\), got -1"),
        ({"final_lr": 1.5}, r"stage 's': final_lr is a share of the peak, 0\.\.1, got 1\.5"),
        ({"decay": -0.1}, r"stage 's': decay is a share of the steps, 0\.\.1, got -0\.1"),
        ({"lr": {"decodr": 1.0}}, "unknown key in stage 's', lr 'decodr': did you mean 'decoder'"),
        ({"lr": {"decoder": -1.0}}, "stage 's': learning rates must be 0 or more"),
        ({"lr": {"decoder": 0.0}}, "stage 's': learning rates .* one of them positive"),
        ({"lr": {}}, "stage 's': learning rates .* one of them positive"),
        ({"data": {"a": -0.1, "b": 1.0}}, "stage 's': weights must be 0 or more"),
        ({"data": {"a": 0.0}}, "stage 's': weights .* one of them positive"),
        ({"data": {}}, "stage 's': weights .* one of them positive"),
    ],
)
def test_mistakes_name_the_stage(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(**changes)


def test_a_schedule_needs_stages_with_different_names() -> None:
    with pytest.raises(ConfigError, match="`stages` is empty"):
        Schedule([])
    with pytest.raises(ConfigError, match="stages must have different names, got s, t, s"):
        Schedule([stage(), stage(name="t"), stage()])


def test_steps_belong_to_stages_up_to_their_boundaries() -> None:
    schedule = Schedule([stage(name="a", steps=3), stage(name="b", steps=1), stage(name="c", steps=2)])
    places = [(index, found.name, own) for index, found, own in map(schedule.at, range(6))]
    assert places == [(0, "a", 0), (0, "a", 1), (0, "a", 2), (1, "b", 0), (2, "c", 0), (2, "c", 1)]
    assert schedule.at(6)[:1] + schedule.at(6)[2:] == (2, 2), "schedulers look one step ahead"
    assert schedule.steps == 6
    assert schedule.starts_by_name() == [("a", 0), ("b", 3), ("c", 4)]


def test_each_stage_warms_up_anew() -> None:
    schedule = Schedule(
        [stage(name="a", steps=4, final_lr=0.0), stage(name="b", steps=4, warmup=1, lr={"decoder": 2.0})]
    )
    rates = [schedule.learning_rate("decoder", step) for step in (0, 3, 4, 5)]
    assert rates == pytest.approx([1.0, 0.14644660940672627, 1.0, 2.0])


def test_trained_parts_are_those_of_any_stage_in_the_order_of_parts() -> None:
    schedule = Schedule([stage(name="a", lr={"decoder": 1.0, "fusion": 0.0}), stage(name="b", lr={"encoder": 1.0})])
    assert schedule.trained_parts() == ["encoder", "decoder"]


rates = st.floats(0, 10) | st.just(0.0)


@st.composite
def stages(draw: st.DrawFn) -> list[Stage]:
    made = []
    for number in range(draw(st.integers(1, 4))):
        steps = draw(st.integers(1, 40))
        lr = draw(st.dictionaries(st.sampled_from(PARTS), rates).filter(lambda lr: any(lr.values())))
        warmup, final = draw(st.integers(0, steps)), draw(st.floats(0, 1))
        made.append(stage(name=str(number), steps=steps, lr=lr, warmup=warmup, final_lr=final))
    return made


@given(stages())
def test_every_step_has_one_stage_and_a_rate_up_to_its_peak(made: list[Stage]) -> None:
    schedule = Schedule(made)
    names = [name for part in made for name in [part.name] * part.steps]
    assert schedule.steps == len(names)
    for step, name in enumerate(names):
        index, found, own = schedule.at(step)
        assert found.name == name and made[index] is found and 0 <= own < found.steps
        assert schedule.starts[index] + own == step
        for part in PARTS:
            rate, peak = schedule.learning_rate(part, step), found.lr.get(part, 0.0)
            assert 0 <= rate <= peak * (1 + 1e-12)
            assert found.trains(part) or rate == 0
        if own == found.warmup:
            assert [found.learning_rate(part, own) for part in PARTS] == pytest.approx(
                [found.lr.get(part, 0.0) for part in PARTS]
            )
    trained = {part for one in made for part in PARTS if one.trains(part)}
    assert set(schedule.trained_parts()) == trained
