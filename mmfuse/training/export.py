"""`mmfuse export`: a run as what others load, an adapter for `peft` or a checkpoint with the adapter merged."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalLM
from mmfuse.models.adapter_files import load_adapter, save_adapter
from mmfuse.models.adopt import AdoptedLM
from mmfuse.models.lora import remove_adapter
from mmfuse.models.serving import engines, is_native
from mmfuse.training.commands import StrictParser
from mmfuse.training.module import MultimodalModule
from mmfuse.training.reporting import ADAPTER, MODEL

CONFIG = "config.yaml"


def main(argv: Sequence[str]) -> int:
    """Write what a run has trained into a folder of its own."""
    parser = StrictParser("export", "Write what a run has trained in a form that other tools load.")
    parser.add_argument("--ckpt", required=True, help="a run folder")
    parser.add_argument("--out", required=True, help="the folder to write, which must not exist or be empty")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the weights it was trained on")
    options = parser.parse(argv[1:])
    run, out = Path(options.ckpt), Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: there is something already; choose another folder")
    if not (run / ADAPTER).is_dir():
        _export_whole(run, out, options.merge)
        return 0
    module = tuned_module(run / ADAPTER, run / CONFIG, merging=options.merge)
    if options.merge:
        # In half precision what the adapter adds would be rounded away where it is small.
        module.network.float()
        remove_adapter(module.network, merge=True)
        _save_merged(module.network, out)
    else:
        _save_adapter(module, run, out)
    module.processor.save_pretrained(out)
    _say(module.network, out, merged=options.merge)
    return 0


def tuned_module(adapter: Path, config: Path, *, merging: bool = False) -> MultimodalModule:
    """The module of a config with the weights of an adapter, every one of which must have its place.

    Args:
        adapter: folder of the adapter.
        config: the resolved config of the run that trained it.
        merging: build the weights below a QLoRA adapter in full precision.

    Raises:
        FileNotFoundError: there is no such config.
        ConfigError: the adapter does not fit the model.
    """
    from mmfuse.training.cli import parse_and_build, resolved_settings

    if not config.is_file():
        raise FileNotFoundError(f"{config}: the config of the run that trained the adapter is missing")
    words = ["--config", str(config)]
    if merging and (resolved_settings(words)["model"]["adapter"] or {}).get("kind") == "qlora":
        words += ["--model.adapter.kind", "lora"]
    module: MultimodalModule = parse_and_build(words, run=False).model
    load_adapter(module.network, adapter)
    module.eval()
    return module


def _save_adapter(module: MultimodalModule, run: Path, out: Path) -> None:
    """The adapter, and, of a model that a config put together, the base that it stands on."""
    assert module.plan is not None
    base = module.pretrained or str(out / "base")
    save_adapter(module.network, out, module.plan, base)
    # How the base is built, and under which fusion, for `mmfuse generate`.
    shutil.copyfile(run / CONFIG, out / CONFIG)
    if module.pretrained is None:
        remove_adapter(module.network, merge=False)
        module.network.save_pretrained(out / "base")


def _save_merged(network: MultimodalLM, out: Path) -> None:
    if isinstance(network, AdoptedLM) and is_native(network):
        network.vlm.save_pretrained(out)
    else:
        network.save_pretrained(out)


def _export_whole(run: Path, out: Path, merge: bool) -> None:
    """A run without an adapter: the model as it was saved, in its own class where that computes the same."""
    if not (run / MODEL / "config.json").is_file():
        raise FileNotFoundError(f"--ckpt {run}: it holds neither {ADAPTER} nor {MODEL}; a run has one when it is done")
    from mmfuse.models.build import load_processor

    network = MultimodalLM.from_pretrained(run / MODEL)
    _save_merged(network, out)
    load_processor(network, run / MODEL).save_pretrained(out)
    _say(network, out, merged=True)


def _say(network: MultimodalLM, out: Path, *, merged: bool) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for engine in engines(network):
        table.add_row(engine.name, "yes" if engine.serves else "no", engine.why)
    console = Console()
    console.print(f"{out}: {'a checkpoint' if merged else 'an adapter in the format of PEFT'}", soft_wrap=True)
    if not merged and isinstance(network, AdoptedLM):
        name = type(network.vlm).__name__
        console.print(f"PeftModel.from_pretrained loads it onto {name}", soft_wrap=True)
        if not is_native(network):
            console.print(f"but {name} runs it under its own mask, for which it was not trained", soft_wrap=True)
    console.print("what can serve the merged model:")
    console.print(table)
