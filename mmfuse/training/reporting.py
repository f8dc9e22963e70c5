"""What a run leaves behind: predictions, `results.json`, pictures, `report.html`, and the model for Hugging Face."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmfuse
from mmfuse.eval.questions import Prediction
from mmfuse.eval.report import write_report
from mmfuse.eval.results import provenance, write_results, write_text_atomically
from mmfuse.eval.scores import score
from mmfuse.models.adapter_files import save_adapter
from mmfuse.training.callbacks import StepMetrics
from mmfuse.training.data import MultimodalData
from mmfuse.training.module import MultimodalModule
from mmfuse.training.pictures import answer_pictures, training_pictures

RESULTS, REPORT, PREDICTIONS, MODEL = "results.json", "report.html", "predictions.jsonl", "model"
ADAPTER = "adapter"

#: What only a fit measures, and a later `test` of the same run keeps.
TRAINING_RESULTS = ("tokens_per_second", "steps", "seconds", "data_hash", "val_loss", "val_exact_match")


class RunReport(Callback):
    """Collects the answers of `test` and `predict` from all ranks and writes the run's results.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: list[Prediction] = []
        self._blind: list[Prediction] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen, self._blind = [], []

    on_predict_start = on_test_start

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._seen += outputs["seen"]
        self._blind += outputs["blind"]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._seen += outputs

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seen, blind = gathered(trainer, self._seen), gathered(trainer, self._blind)
        if trainer.is_global_zero and seen:
            assert isinstance(pl_module, MultimodalModule)
            write_predictions(self.folder / PREDICTIONS, seen, blind)
            results = write_run_results(self.folder, trainer, pl_module, seen, blind)
            Console().print(scores_table(results))
            Console().print(f"report: {self.folder / REPORT}", highlight=False, soft_wrap=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seen = gathered(trainer, self._seen)
        if trainer.is_global_zero:
            write_predictions(self.folder / PREDICTIONS, seen)


def gathered(trainer: Trainer, own: list[Prediction]) -> list[Prediction]:
    """The predictions of all ranks in the order of the source, of which rank r answered every `world`-th from r on."""
    world = trainer.world_size
    if world == 1:
        return own
    parts: list[list[Prediction]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(parts, own)
    return [parts[place % world][place // world] for place in range(sum(map(len, parts)))]


def write_predictions(path: Path, seen: Sequence[Prediction], blind: Sequence[Prediction] = ()) -> None:
    """One JSON line for each question; `blind` adds what the model said without the image."""
    lines = []
    for number, prediction in enumerate(seen):
        row = {name: value for name, value in asdict(prediction).items() if name != "index"}
        if blind:
            row["blind_prediction"] = blind[number].prediction
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text_atomically(path, "\n".join(lines) + "\n")


def write_run_results(
    folder: Path,
    trainer: Trainer,
    module: MultimodalModule,
    seen: Sequence[Prediction] = (),
    blind: Sequence[Prediction] = (),
) -> dict[str, Any]:
    """Write pictures, `results.json` and `report.html`; without held-out answers, of what training measured alone.

    A `test` of a finished run replaces the scores and keeps what training measured.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, MultimodalData)
    scores = score(seen, blind) if seen else {}
    pictures = training_pictures(folder, module)
    if seen:
        with trainer.precision_plugin.forward_context():
            pictures += answer_pictures(folder, module, data.sources["test"], seen, blind, scores)
    seconds = round(time.monotonic() - mmfuse.STARTED, 1)
    results = {**scores, **describe_run(trainer, module, data), "seconds": seconds}
    if "steps" not in results:
        results |= _measured_in_training(folder)
    write_results(folder / RESULTS, **results)
    config = folder / "config.yaml"
    write_report(
        folder,
        title=f"mmfuse: {folder.name}",
        results=results,
        config_text=config.read_text(encoding="utf-8") if config.exists() else "",
        pictures=pictures,
        predictions=seen,
        blind=blind or None,
    )
    return results


def scores_table(results: Mapping[str, Any]) -> Table:
    """Exact match by family, beside the blind score and the majority answer."""
    table = Table(title=f"held-out questions, fusion: {results['fusion']}", title_justify="left")
    for name in ("family", "questions", "exact match", "blind", "majority"):
        table.add_column(name, justify="left" if name == "family" else "right")
    rows = {**results["by_family"], "all": results}
    for family, own in rows.items():
        if family == "all":
            table.add_section()
        accuracies = (own["exact_match"], own["blind_exact_match"], own["majority_exact_match"])
        table.add_row(family, f"{own['n']:,}", *(f"{value:.1%}" for value in accuracies))
    return table


def describe_run(trainer: Trainer, module: MultimodalModule, data: MultimodalData) -> dict[str, Any]:
    """What was run on what: flat, for `results.json`."""
    fingerprints = data.fingerprints()
    trained = [callback for callback in trainer.callbacks if isinstance(callback, StepMetrics)]  # type: ignore[attr-defined]
    speeds = [callback.tokens_per_second for callback in trained if callback.total_tokens]
    network = module.network
    validated = {
        name.replace("/", "_"): float(trainer.callback_metrics[name])
        for name in ("val/loss", "val/exact_match")
        if name in trainer.callback_metrics
    }
    return {
        **({"tokens_per_second": round(speeds[0], 1), "steps": trainer.global_step} if speeds else {}),
        **validated,
        "fusion": fusion_name(network.config.fusion),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "seed": data.seed,
        "data_hash": hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()[:16],
        **provenance(),
    }


def fusion_name(spec: Any) -> str:
    """The strategy's name, from its name or its spec."""
    return spec if isinstance(spec, str) else str(spec["type"])


def _measured_in_training(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    if not path.exists():
        return {}
    old = json.loads(path.read_text(encoding="utf-8"))
    return {name: old[name] for name in TRAINING_RESULTS if name in old}


def export_model(folder: Path, module: MultimodalModule, weights: dict[str, Tensor] | None = None) -> Path:
    """Save network and processor as Hugging Face does, which is what `mmfuse generate` and `from_pretrained` read.

    Of a model with an adapter, what trains is saved alone, in PEFT's format.

    Args:
        folder: of the run.
        module: the model.
        weights: its whole weights, if it does not hold them itself.
    """
    name = MODEL if module.plan is None else ADAPTER
    target, scratch = folder / name, folder / f".{name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    if module.plan is None:
        module.network.save_pretrained(scratch, state_dict=weights)
    else:
        save_adapter(module.network, scratch, module.plan, module.pretrained)
    module.processor.save_pretrained(scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    return target
