"""`mmfuse compare`: what is held equal, and how runs are started, continued and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from mmfuse.errors import ConfigError, DataError
from mmfuse.fusion import FUSIONS
from mmfuse.training.cli import parse_and_build, resolved_settings
from mmfuse.training.compare.budget import FILE, scaling_words, step_seconds, training_factors
from mmfuse.training.compare.command import plan_runs
from mmfuse.training.compare.display import watching
from mmfuse.training.compare.runs import Failure, Run, last_step, run_command, tail, train
from mmfuse.training.compare.strategies import differences, parse_choices, resolve_strategies, settings_words
from mmfuse.training.compare.summary import check_same_data

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]

#: A fusion that is refused when the model is built, which is after the command has looked at everything.
BROKEN = {"model": {"network": {"fusion": {"type": "mma", "layers": [99]}}}}


# What is held equal


def test_strategies_of_one_seed_share_initial_weights_and_the_order_of_samples(write_config: WriteConfig) -> None:
    config = write_config()
    weights: dict[str, dict[str, torch.Tensor]] = {}
    orders: dict[str, list[Any]] = {}
    for name in FUSIONS:
        words = ["--config", str(config), "--model.network.fusion", name, "--seed_everything", "3"]
        cli = parse_and_build(words, run=False)
        parts = cli.model.network.parts()
        del parts["fusion"]
        weights[name] = {f"{part}.{key}": v for part, m in parts.items() for key, v in m.state_dict().items()}
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        plan = cli.datamodule.plan()
        orders[name] = [plan.window(stage, number) for stage in range(2) for number in range(5)]
    first = next(iter(FUSIONS))
    for name in FUSIONS:
        assert orders[name] == orders[first], name
        assert weights[name].keys() == weights[first].keys()
        for key, value in weights[name].items():
            torch.testing.assert_close(value, weights[first][key], rtol=0, atol=0, msg=f"{name}: {key}")


def test_names_are_names_and_files_are_files(tmp_path: Path) -> None:
    file = tmp_path / "saisa.yaml"
    file.write_text("model: {}")
    assert parse_choices(f"causal, mma,{file}") == {
        "causal": ("--model.network.fusion", "causal"),
        "mma": ("--model.network.fusion", "mma"),
        "saisa": ("--config", str(file)),
    }


def test_file_may_change_fusion_and_learning_rates_only(
    write_config: WriteConfig, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = str(write_config())
    stages = [{**stage, "lr": {"decoder": 0.1, "fusion": 0.2}, "fusion": None} for stage in settings["stages"]]
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"stages": stages, **BROKEN}))
    causal, found = resolve_strategies(f"causal,{own}", [config], ["model.ema_decay=0.5"])
    assert causal.settings["model"]["network"]["fusion"] == "causal"
    assert found.settings["stages"][0]["lr"] == {"decoder": 0.1, "fusion": 0.2}
    assert found.settings["model"]["ema_decay"] == causal.settings["model"]["ema_decay"] == 0.5
    own.write_text(yaml.safe_dump({"data": {"init_args": {"batch_size": 4}}}))
    with pytest.raises(ConfigError, match=r"own\.yaml: data\.init_args\.batch_size is 4 there and 8 in the config"):
        resolve_strategies(str(own), [config])


def test_differences_name_the_key() -> None:
    one = {"a": [{"b": 1}, {"b": 2}], "c": None, "d": [1, 2]}
    other = {"a": [{"b": 1}, {"b": 3}], "d": [1], "e": 0}
    assert list(differences(one, other)) == [
        ("a[1].b", "2", "3"),
        ("c", "None", "absent"),
        ("d", "[1, 2]", "[1]"),
        ("e", "absent", "0"),
    ]
    assert not list(differences(one, one))


# Mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fusion", "causl"], "unknown fusion 'causl': did you mean 'causal'?"),
        (["--fusion", "causal,causal"], "two strategies are called 'causal'"),
        (["--fusion", "gone.yaml"], "--fusion gone.yaml: there is no such file"),
        (["--fusion", ","], "--fusion names no strategy"),
        (["--fusion", "mma", "--seed", "3"], "unknown option '--seed': did you mean '--seeds'?"),
        (["--fusion", "mma", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--fusion", "mma", "--budget", "flop"], "unknown budget 'flop': did you mean 'flops'?"),
        (["--fusion", "mma", "--set", "model.ema_decai=0.5"], "did you mean --model.ema_decay?"),
        (["--fusion", "mma", "--set", "model.ema_decay"], "expected KEY=VALUE"),
        (["--fusion", "mma", "--set", "seed_everything=3"], "`compare` sets seed_everything itself"),
        (["--fusion", "mma", "--set", "trainer.max_steps=3", "--budget", "flops"], "trainer.max_steps"),
        ([], "--fusion"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, words: list[str], said: str
) -> None:
    ran = mmfuse("compare", "--config", write_config(), "--out", tmp_path / "out", *words)
    assert ran.code == 2, ran.err
    assert len(ran.err.strip().splitlines()[-1:]) == 1 and said in ran.err.strip().splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.log"))


def test_config_without_held_out_questions_is_refused(
    mmfuse: Command, tmp_path: Path, settings: dict[str, Any]
) -> None:
    train = {name: {"path": f"{name}.json"} for name in ("align", "instruct")}
    data = {"class_path": "MultimodalData", "init_args": {"train": train}}
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump({**settings, "data": data}))
    ran = mmfuse("compare", "--config", config, "--fusion", "mma", "--out", tmp_path / "out")
    assert ran.code == 2 and "data.init_args.test is not set" in ran.err


def test_settings_become_flags() -> None:
    assert settings_words(["a.b=1", "--c=[1, 2]"]) == ["--a.b=1", "--c=[1, 2]"]


# Budget


def planned(config: Path, out: Path, fusion: str = "causal", seeds: int = 1, factor: float = 1.0) -> list[Run]:
    strategies = resolve_strategies(fusion, [str(config)])
    return plan_runs(out, strategies, {strategy.label: factor for strategy in strategies}, seeds)


def test_steps_warm_up_and_validation_are_scaled_alike(write_config: WriteConfig, settings: dict[str, Any]) -> None:
    long = [{**stage, "steps": steps} for stage, steps in zip(settings["stages"], (100, 900), strict=True)]
    config = write_config({"stages": long, "trainer": {"val_check_interval": 250}})
    words = scaling_words(resolved_settings(["--config", str(config)]), 0.33)
    scaled = resolved_settings(["--config", str(config), *words])
    assert [stage["steps"] for stage in scaled["stages"]] == [33, 297]
    assert scaled["trainer"]["val_check_interval"] == 82  # four validations, as before
    assert scaling_words(scaled, 1) == []
    tiny = resolved_settings(["--config", str(config), *scaling_words(scaled, 1e-6)])
    assert [(stage["steps"], stage["warmup"]) for stage in tiny["stages"]] == [(1, 0), (1, 0)]


def test_runs_go_seed_by_seed_and_hold_what_fit_will_save(write_config: WriteConfig, tmp_path: Path) -> None:
    runs = planned(write_config(), tmp_path, "causal,mma", seeds=2, factor=2.0)
    assert [run.name for run in runs] == ["causal seed 0", "mma seed 0", "causal seed 1", "mma seed 1"]
    assert runs[3].folder == tmp_path / "mma" / "seed-1" and runs[3].log == tmp_path / "mma" / "seed-1.log"
    assert [run.steps for run in runs] == [16] * 4
    assert runs[3].settings["seed_everything"] == 1


def test_budget_in_flops_weighs_strategies_and_is_kept(write_config: WriteConfig, tmp_path: Path) -> None:
    strategies = resolve_strategies("causal,mma", [str(write_config())])
    factors = training_factors("flops", tmp_path, strategies)
    # These two compute the same products; only their masks differ.
    assert factors == {"causal": 1.0, "mma": 1.0}
    held = json.loads((tmp_path / FILE).read_text())
    (mine,) = (key for key in held["cost_of_step"] if key.startswith("mma"))
    held["cost_of_step"][mine] = [2 * cost for cost in held["cost_of_step"][mine]]
    (tmp_path / FILE).write_text(json.dumps(held))
    assert training_factors("flops", tmp_path, strategies) == {"causal": 1.0, "mma": 0.5}
    with pytest.raises(ConfigError, match="was begun with --budget flops, not steps"):
        training_factors("steps", tmp_path, strategies)
    other = resolve_strategies("causal,mma", [str(write_config({"data": {"init_args": {"batch_size": 4}}}))])
    assert training_factors("flops", tmp_path, other) == {"causal": 1.0, "mma": 1.0}
    assert training_factors("flops", tmp_path, strategies) == {"causal": 1.0, "mma": 0.5}


@pytest.mark.slow
def test_steps_are_timed_in_a_run_of_their_own(write_config: WriteConfig, tmp_path: Path) -> None:
    (strategy,) = resolve_strategies("mma", [str(write_config())])
    seconds = step_seconds(strategy, tmp_path / "mma")
    assert len(seconds) == 2 and all(0 < value < 5 for value in seconds)
    assert [path.name for path in (tmp_path / "mma").iterdir()] == ["timing.log"]


# Runs


class Recorded:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def begin(self, run: Run) -> None:
        self.said.append(f"begin {run.name}")

    def tick(self, run: Run) -> None:
        pass

    def end(self, run: Run, failure: Failure | None) -> None:
        self.said.append(f"{'failed' if failure else 'end'} {run.name}")


def test_run_of_another_config_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    (run,) = planned(write_config(), tmp_path / "out")
    run.check_config()
    run.folder.mkdir(parents=True)
    held = {**run.settings, "out": "elsewhere"}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(held))
    run.check_config()
    held["model"] = {**held["model"], "max_new_tokens": 9}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(held))
    with pytest.raises(ConfigError, match=r"another config: model\.max_new_tokens is 9 there and 4 now"):
        run.check_config()


def test_finished_runs_are_skipped_and_a_checkpoint_is_continued(write_config: WriteConfig, tmp_path: Path) -> None:
    (run,) = planned(write_config(), tmp_path)
    assert "--ckpt_path" not in run.resume_words()
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / "last.ckpt").touch()
    assert run.resume_words()[-2:] == ["--ckpt_path", "last"]
    (run.folder / "results.json").write_text('{"steps": 8}')
    assert run.results is None, "a run without scores is not finished"
    (run.folder / "results.json").write_text('{"exact_match": 0.5}')
    watcher = Recorded()
    assert train([run], watcher) == []
    assert watcher.said == ["end causal seed 0"]


def test_child_writes_its_log_and_its_exit_code_is_known(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "child.log"
    looked: list[int] = []
    assert run_command(["--version"], log, lambda: looked.append(1), every=0.001) == 0
    assert run_command(["fitt"], log) == 2
    lines = log.read_text().splitlines()
    assert lines[0].startswith("mmfuse ") and "did you mean 'fit'" in lines[1]
    assert looked and tail(log, 1) == lines[1]
    assert tail(tmp_path / "none.log") == ""


def test_interrupted_command_ends_its_child(tmp_path: Path) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_command(["--version"], tmp_path / "child.log", interrupt, every=0.0001)
    assert signal.getsignal(signal.SIGTERM) is before


def test_last_step_is_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert last_step(path) == 0
    path.write_text("step,train/loss\n")
    assert last_step(path) == 0
    path.write_text("step,train/loss\n" + "".join(f"{step},{1 / step}\n" for step in range(1, 5000)))
    assert last_step(path) == 4999


# What people see


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_every_run_and_failures(terminal: bool, write_config: WriteConfig, tmp_path: Path) -> None:
    done, broken = planned(write_config(), tmp_path, "causal,mma")
    done.folder.mkdir(parents=True)
    (done.folder / "metrics.csv").write_text("step\n3\n")
    screen = StringIO()
    with watching(Console(file=screen, force_terminal=terminal, width=120), [done, broken]) as watcher:
        watcher.begin(done)
        watcher.tick(done)
        (done.folder / "results.json").write_text('{"exact_match": 0.5}')
        watcher.end(done, None)
        watcher.begin(broken)
        watcher.end(broken, Failure(broken, "exit code 1", "the last\nlines"))
    shown = screen.getvalue()
    for part in ("causal seed 0", "exact match 50.0%", "mma seed 0 failed (exit code 1)", "    lines"):
        assert part in shown
    assert ("\x1b" in shown) == terminal


def test_runs_on_other_data_are_not_compared(write_config: WriteConfig, tmp_path: Path) -> None:
    runs = planned(write_config(), tmp_path, "causal,mma")
    for number, run in enumerate(runs):
        run.folder.mkdir(parents=True)
        (run.folder / "results.json").write_text(json.dumps({"exact_match": 0.5, "data_hash": str(number)}))
    with pytest.raises(DataError, match="mma seed 0 was run on other data than causal seed 0"):
        check_same_data(runs)


# All of it


@pytest.mark.slow
def test_comparison_survives_a_failing_strategy_and_is_complete_when_repeated(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, read_json: Callable[[Path], Any]
) -> None:
    broken, out = tmp_path / "broken.yaml", tmp_path / "out"
    broken.write_text(yaml.safe_dump(BROKEN))
    words = ["compare", "--config", write_config(), "--out", out, "--seeds", "2", "--fusion"]
    ran = mmfuse(*words, f"causal,{broken},mma")
    assert ran.code == 1
    assert "broken seed 0 failed (exit code 1)" in ran.err and "99" in ran.err
    assert "2 of 6 runs failed: broken seed 0" in ran.err.splitlines()[-1]
    assert "failed" in ran.out and "mma" in ran.out
    held = {row["label"]: row for row in read_json(out / "compare.json")["strategies"]}
    assert [held[label]["seeds"] for label in ("causal", "broken", "mma")] == [[0, 1], [], [0, 1]]
    mine = held["mma"]["scores"]
    assert mine["exact_match"]["questions"] == 28 and mine["difference"]["seeds"] == 2
    assert mine["train_seconds"] > 0 and mine["cost"]["train_flops_per_sample"] > 1e6
    assert held["causal"]["scores"]["difference"] is None
    for picture in ("quality.png", "quality-flops.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 300
    assert "| mma |" in (out / "compare.md").read_text()

    results = {path: path.stat().st_mtime_ns for path in out.rglob("results.json")}
    assert len(results) == 4
    again = mmfuse(*words, "causal,mma")
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("results.json")} == results
    assert "trains" not in again.err

    other = mmfuse(*words, "causal,mma", "--set", "model.ema_decay=0.5")
    assert other.code == 2 and "model.ema_decay is None there and 0.5 now" in other.err


@pytest.mark.slow
def test_interrupted_comparison_continues(
    write_config: WriteConfig,
    tmp_path: Path,
    settings: dict[str, Any],
    mmfuse: Command,
    read_rows: Callable[[Path], Any],
) -> None:
    config = write_config({"stages": [{**settings["stages"][1], "steps": 150}]})
    out = tmp_path / "out"
    words = ["compare", "--config", str(config), "--out", str(out), "--fusion", "mma"]
    metrics = out / "mma" / "seed-0" / "metrics.csv"
    with subprocess.Popen([sys.executable, "-m", "mmfuse", *words], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while last_step(metrics) < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "mmfuse: interrupted" in error and "Traceback" not in error
    assert not (out / "mma" / "seed-0" / "results.json").exists()
    ran = mmfuse(*words)
    assert ran.code == 0, ran.err
    assert "continued from step" in ran.err
    assert [row["step"] for row in read_rows(metrics.parent)] == list(range(1, 151))
    assert sorted(path.name for path in (out / "mma").iterdir()) == ["seed-0", "seed-0.log"]
