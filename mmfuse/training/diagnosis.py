"""`mmfuse diagnose`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfuse.errors import ConfigError
from mmfuse.training.commands import StrictParser, model_folder


def main(argv: Sequence[str]) -> int:
    """Does a model use its media, and where? Numbers as JSON, and a picture of each diagnostic."""
    parser = StrictParser("diagnose", "Does a model use its media, and where? Numbers and a picture of each.")
    add = parser.add_argument
    add("--ckpt", required=True, help="a run folder, or a model saved by save_pretrained")
    add("--tasks", default="suite", help="tasks or groups, separated by commas (default: suite, which is embedded)")
    add("--out", required=True, help="folder for diagnostics.json and pictures; answers are kept there, too")
    add("--samples", type=int, default=16, help="items of each task that the model is looked at with (default: 16)")
    add("--limit", type=int, help="items of each task whose answers are looked at (default: all)")
    options = parser.parse(argv[1:])
    for name in ("samples", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(options, name)}")
    folder = model_folder(Path(options.ckpt))

    from mmfuse.analysis.diagnostic_plots import plot_diagnostics
    from mmfuse.eval.biases import of_answers
    from mmfuse.eval.diagnosis import diagnose
    from mmfuse.eval.engine import NetworkEngine
    from mmfuse.eval.results import provenance, write_text_atomically
    from mmfuse.eval.runner import run_task
    from mmfuse.eval.tasks import find_tasks
    from mmfuse.training.inference import load_model

    engine, out = NetworkEngine(*load_model(folder)), Path(options.out)
    found: dict[str, Any] = {}
    for task in find_tasks(options.tasks.split(",")):
        found[task.name] = diagnose(engine, task, options.samples, lambda text: print(text, file=sys.stderr))
        asked = task.first(options.limit)
        found[task.name] |= of_answers(asked, run_task(engine, asked, out).records)
    document = {"schema": 1, "model": engine.identity(), "tasks": found, "origin": provenance()}
    write_text_atomically(out / "diagnostics.json", json.dumps(_plain(document), indent=1) + "\n")
    pictures = plot_diagnostics(found, out)
    for name, own in found.items():
        parts = [f"{key} {value['mean']:+.3f} nats" for key, value in own["ablation"].items()]
        print(f"{name}: what the image adds to log p of the right answer: {', '.join(parts)}")
    print(f"numbers: {out / 'diagnostics.json'}; pictures: {', '.join(path.name for path in pictures)}")
    return 0


def _plain(value: Any) -> Any:
    """The same with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
