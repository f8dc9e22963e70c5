from __future__ import annotations

import pytest

from mmfuse.analysis.comparison_plots import Point, plot_quality, plot_quality_against_flops, sidesteps


def point(label, flops=1e9, mean=0.5, blind=0.2):
    return Point(label, mean, mean - 0.1, mean + 0.1, [mean - 0.05, mean + 0.05], blind, flops)


@pytest.mark.parametrize("draw", [plot_quality, plot_quality_against_flops])
def test_every_strategy_is_named(draw, tmp_path):
    names = [f"strategy_{number}" for number in range(12)]
    path = tmp_path / "plot.svg"
    draw([point(name, flops=1e9 * (1 + number // 2)) for number, name in enumerate(names)], path)
    text = path.read_text()
    assert all(name in text for name in names)
    assert "exact match" in text


def test_scores_at_both_ends_and_without_blind_can_be_drawn(tmp_path):
    ends = [Point("none", 0.0, 0.0, 0.1, [0.0], None, 10.0), Point("all", 1.0, 0.9, 1.0, [1.0], None, 10.0)]
    for draw in (plot_quality, plot_quality_against_flops):
        draw(ends, tmp_path / "plot.png")
        with pytest.raises(ValueError, match="no strategies to plot"):
            draw([], tmp_path / "none.png")


def test_strategies_of_equal_cost_stand_side_by_side():
    costs = {"a": 5.1e7, "b": 5.1e7, "c": 5.12e7, "d": 3.0e7, "e": 2.95e7}
    assert sidesteps([point(name, cost) for name, cost in costs.items()]) == [-1.0, 0.0, 1.0, 0.5, -0.5]
