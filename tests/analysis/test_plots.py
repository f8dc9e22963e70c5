from __future__ import annotations

import csv
import re
from dataclasses import dataclass

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmfuse.analysis import AttentionExample, plot_attention, plot_families, plot_losses, plot_predictions
from mmfuse.analysis.plots import read_metrics, smooth
from mmfuse.data import Sample
from mmfuse.models.media import Features


@dataclass
class Answer:
    key: str
    question: str
    answer: str
    prediction: str
    right: bool


def colours(path):
    """The colours of a picture, as a set of (r, g, b)."""
    with Image.open(path) as image:
        return {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}


def rgb(hexadecimal):
    return tuple(int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))


def sample(key="a", mode="L", size=(16, 16), images=1):
    return Sample(key, tuple(Image.new(mode, size, 0) for _ in range(images)), None, "x", {})


def write_csv(path, rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts(path):
    """The texts of an SVG, which matplotlib puts into comments beside their outlines."""
    return path.read_text(encoding="utf-8")


# Curves


def test_metrics_are_read_by_column_and_step(tmp_path):
    rows = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.0, "val/loss": 1.5, "note": "text"},
        {"step": 2, "train/loss": 2.5},
        {"step": 0, "train/loss": 4.0},
        {"step": 3, "train/loss": "nan"},
        {"step": 4, "train/loss": "inf", "val/loss": ""},
    ]
    found = read_metrics(write_csv(tmp_path / "metrics.csv", rows))
    assert found == {"train/loss": ([0, 1, 2], [4.0, 3.0, 2.5]), "val/loss": ([2], [1.5])}


def test_curves_need_steps_and_losses(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.csv: there is no column 'step'"):
        plot_losses(write_csv(tmp_path / "metrics.csv", [{"epoch": 1}]), tmp_path / "x.png")
    with pytest.raises(ValueError, match="neither train/loss nor val/loss"):
        plot_losses(write_csv(tmp_path / "metrics.csv", [{"step": 1, "lr": 1}]), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("row", "panels"),
    [
        ({"train/loss": 1.0}, 1),
        ({"val/loss": 1.0}, 1),
        ({"train/loss": 1.0, "lr": 1e-3}, 2),
        ({"train/loss": 1.0, "val/exact_match": 0.5, "lr/encoder": 1e-3, "lr/decoder": 1e-3}, 3),
        ({"train/loss": 0.0}, 1),
    ],
)
@pytest.mark.parametrize("steps", [1, 200])
@pytest.mark.filterwarnings("error::UserWarning")
def test_curves_of_what_there_is(tmp_path, row, panels, steps):
    rows = [{"step": step, **row} for step in range(steps)]
    path = tmp_path / "losses.svg"
    plot_losses(write_csv(tmp_path / "metrics.csv", rows), path, stages=[("align", 0), ("instruct", 3)])
    assert len(set(re.findall(r'id="(axes_\d+)"', texts(path)))) == panels


def test_a_stage_that_the_run_did_not_reach_is_left_out(tmp_path):
    rows = [{"step": step, "train/loss": 1.0} for step in range(10)]
    plot_losses(write_csv(tmp_path / "metrics.csv", rows), tmp_path / "x.svg", stages=[("align", 0), ("instruct", 50)])
    assert "<!-- align -->" in texts(tmp_path / "x.svg") and "instruct" not in texts(tmp_path / "x.svg")


def test_names_of_stages_that_would_touch_stand_on_two_lines(tmp_path):
    rows = [{"step": step, "train/loss": 1.0 + step % 3} for step in range(1000)]
    path = tmp_path / "losses.svg"
    plot_losses(
        write_csv(tmp_path / "metrics.csv", rows), path, stages=[("align", 0), ("instruct", 10), ("$end_", 900)]
    )
    text = texts(path)
    assert all(f"<!-- {name} -->" in text for name in ("align", "instruct", "$end_"))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=50), st.integers(1, 20))
def test_smoothing_keeps_length_range_and_straight_lines(values, span):
    found = smooth(values, span)
    assert len(found) == len(values)
    assert min(values) - 1e-6 <= min(found) and max(found) <= max(values) + 1e-6
    line = [3.0 - 0.5 * at for at in range(len(values))]
    assert smooth(line, span) == pytest.approx(line)


# Families


def family(n=10, accuracy=0.9, **changes):
    row = {"n": n, "exact_match": accuracy, "interval": [max(0, accuracy - 0.1), min(1, accuracy + 0.1)]}
    return {**row, "blind_exact_match": 0.2, "majority_exact_match": 0.3, **changes}


@pytest.mark.parametrize("blind", [0.2, None])
def test_bars_of_families(tmp_path, blind):
    table = {"read": family(blind_exact_match=blind), "all_right": family(accuracy=1.0, blind_exact_match=blind)}
    path = tmp_path / "families.svg"
    plot_families({**family(20, 0.95, blind_exact_match=blind), "by_family": table}, path)
    text = texts(path)
    assert "<!-- 95.0 % -->" in text and "<!-- 100.0 % -->" in text and "<!-- all questions -->" in text
    assert ("blind" in text) is (blind is not None)


def test_no_families_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there are no families to plot"):
        plot_families({**family(), "by_family": {}}, tmp_path / "x.png")


# Answers


def test_right_and_wrong_differ_by_colour_and_mark(tmp_path):
    right, wrong = Answer("a", "q", "1", "1", True), Answer("a", "q", "1", "2", False)
    found = {}
    for name, answer in (("right", right), ("wrong", wrong)):
        plot_predictions([sample()], [answer], tmp_path / f"{name}.png")
        plot_predictions([sample()], [answer], tmp_path / f"{name}.svg")
        found[name] = colours(tmp_path / f"{name}.png"), texts(tmp_path / f"{name}.svg")
    green, red = rgb("#00694C"), rgb("#B23A00")
    assert green in found["right"][0] and red not in found["right"][0]
    assert red in found["wrong"][0] and green not in found["wrong"][0]
    assert "<!-- ✓ 1 -->" in found["right"][1] and "<!-- ✗ 2 -->" in found["wrong"][1]


def test_a_sheet_shows_any_text_and_any_image(tmp_path):
    samples = [
        sample("a", "L"),
        sample("b", "RGB", (40, 10)),
        sample("c", "P"),
        sample("d", "RGBA"),
        sample("e", images=0),
        Sample("f", (np.zeros((8, 8), np.uint8),), None, "x", {}),
        Sample("g", (Features.of(np.zeros((3, 5)), "g.npy"),), None, "x", {}),
    ]
    odd = ["$x^2", "\x00\x07\ufffd", "word " * 60, "", "w" * 300, "<script>", "features"]
    given = [Answer(s.key, text, text, text, False) for s, text in zip(samples, odd, strict=True)]
    path = tmp_path / "sheet.svg"
    plot_predictions(samples, given, path, blind=given)
    text = texts(path)
    assert text.count("no image") == 2
    assert "(nothing)" in text and "$x^2" in text
    with matplotlib.rc_context({"figure.dpi": 10}):
        plot_predictions(samples[:1], given[:1], tmp_path / "sheet.png", columns=4)


def test_a_sheet_needs_the_predictions_of_its_samples(tmp_path):
    answer = Answer("a", "q", "1", "1", True)
    with pytest.raises(ValueError, match="at least one sample"):
        plot_predictions([], [], tmp_path / "x.png")
    with pytest.raises(ValueError, match="the predictions are not those of the 1 samples"):
        plot_predictions([sample("b")], [answer], tmp_path / "x.png")
    with pytest.raises(ValueError, match="the blind predictions are not those"):
        plot_predictions([sample("a")], [answer], tmp_path / "x.png", blind=[answer, answer])


# Attention


def example(tokens=("7",), layers=2, grid=(2, 2), image=None):
    maps = torch.rand(layers, len(tokens), *grid) / (grid[0] * grid[1])
    image = Image.new("L", (16, 16), 128) if image is None else image
    return AttentionExample("a", image, "What is right of 7?", tokens, tuple(range(layers)), maps)


def test_maps_of_each_token_and_layer(tmp_path):
    path = tmp_path / "attention.svg"
    plot_attention([example(("3", " ", "5"), layers=2)], path)
    text = texts(path)
    assert "“3”" in text and "“5”" in text and "“”" not in text
    assert "layer 0" in text and "layer 1" in text
    assert text.count("% on the image") == 2 * 2


def test_of_many_layers_and_tokens_some_are_shown(tmp_path):
    path = tmp_path / "attention.svg"
    plot_attention([example(tuple("123456789"), layers=32, grid=(3, 5))], path, max_layers=4, max_tokens=2)
    text = texts(path)
    assert text.count("% on the image") == 4 * 2
    assert all(f"<!-- layer {layer} -->" in text for layer in (0, 10, 21, 31))


def test_a_photograph_and_an_array(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    examples = [example(grid=(12, 16), image=Image.fromarray(noise)), example(grid=(12, 16), image=noise)]
    plot_attention(examples, tmp_path / "attention.png")
    assert len(colours(tmp_path / "attention.png")) > 1000


def test_nothing_to_show_is_an_error(tmp_path):
    for examples in ([], [example((" ", "\n"))]):
        with pytest.raises(ValueError, match="no answer tokens"):
            plot_attention(examples, tmp_path / "x.png")


def test_plots_leave_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), plt.rcParams.copy()
    plot_attention([example()], tmp_path / "a.png")
    plot_predictions([sample()], [Answer("a", "q", "1", "1", True)], tmp_path / "b.png")
    assert (plt.get_fignums(), plt.rcParams.copy()) == before
