"""The commands beside training: `compare`, `generate`, `explain` and `list`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from mmfuse.errors import ConfigError, unknown
from mmfuse.training.imports import FLAG


class StrictParser(argparse.ArgumentParser):
    """Argparse without abbreviations, whose errors say what was meant and end in the one place that prints errors."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=f"mmfuse {prog}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        options, rest = self.parse_known_args(list(words))
        if rest:
            self._refuse(rest[0])
        return options

    def parse_with_overrides(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """As `parse`, but hand back the words that set keys of a config, such as `--model.tokenizer NAME`."""
        options, rest = self.parse_known_args(list(words))
        for number, word in enumerate(rest):
            is_flag = word.startswith("-") or number == 0
            if is_flag and word.split("=")[0] != FLAG and "." not in word.split("=")[0]:
                self._refuse(word)
        return options, rest

    def _refuse(self, word: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        raise ConfigError(unknown("option", word.split("=")[0], flags))


def generate(argv: Sequence[str]) -> int:
    """Answer one prompt with a trained model."""
    parser = StrictParser("generate", "Answer one prompt with a trained model, with or without media.")
    parser.add_argument("--ckpt", required=True, help="a run folder, or a model saved by save_pretrained")
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--image", action="append", default=[], help="an image file; repeat for several")
    parser.add_argument("--audio", action="append", default=[], help="a file of audio features; repeat for several")
    parser.add_argument("--eeg", action="append", default=[], help="a file of EEG features; repeat for several")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="the longest answer, in tokens (default: 64)")
    parser.add_argument("--num_beams", type=int, default=1, help="beams; 1 is greedy (default: 1)")
    options = parser.parse(argv[1:])
    folder = model_folder(Path(options.ckpt))
    files = {name: [Path(path) for path in getattr(options, name)] for name in ("image", "audio", "eeg")}
    for name, paths in files.items():
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"--{name} {path}: there is no such file")

    from mmfuse.training.inference import answer, load_model

    model, processor = load_model(folder)
    print(
        answer(
            model,
            processor,
            options.prompt,
            files["image"],
            files["audio"],
            files["eeg"],
            max_new_tokens=options.max_new_tokens,
            num_beams=options.num_beams,
        )
    )
    return 0


def model_folder(path: Path) -> Path:
    """The folder of a saved model or adapter: `path` itself, or `model` or `adapter` in a run folder.

    Raises:
        FileNotFoundError: neither holds a model.
    """
    for folder in (path / "model", path / "adapter", path):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    if not path.exists():
        raise FileNotFoundError(f"--ckpt {path}: there is no such folder")
    raise FileNotFoundError(
        f"--ckpt {path}: neither {path / 'model'} nor {path} holds a model (config.json), and there is no adapter; a "
        "run has one when it is done"
    )


def explain(argv: Sequence[str]) -> int:
    """Show what a config makes of its first batch in each stage."""
    from mmfuse.training.explain import main

    return main(argv)


def compare(argv: Sequence[str]) -> int:
    """Train one config under several fusion strategies and compare them."""
    from mmfuse.training.compare.command import main

    return main(argv)


def list_(argv: Sequence[str]) -> int:
    """Name what configs can choose from."""
    parser = StrictParser("list", "Name what a config can choose from.")
    parser.add_argument("kind", nargs="?", help="one kind only")
    options = parser.parse(argv[1:])
    kinds = available()
    if options.kind is not None and options.kind not in kinds:
        raise ConfigError(unknown("kind", options.kind, kinds))
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for kind in [options.kind] if options.kind else kinds:
        table = Table(title=kind, title_justify="left", box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True, min_width=22)
        table.add_column()
        for name, meaning in kinds[kind].items():
            table.add_row(f"  {name}", Text(meaning))
        Console().print(table, end="\n\n" if not options.kind else "\n")
    return 0


def available() -> dict[str, dict[str, str]]:
    """For each kind of part the names that a config may use, each with a line about it."""
    from mmfuse.fusion import FUSIONS
    from mmfuse.kernels import BACKEND_NAMES
    from mmfuse.models.adopt.families import ADAPTERS
    from mmfuse.models.config import DECODER_FAMILIES
    from mmfuse.models.connectors import CONNECTORS
    from mmfuse.models.encoders import ENCODERS
    from mmfuse.training.data import HandwritingData, MultimodalData

    return {
        "fusions": _first_lines(FUSIONS),
        "encoders": _first_lines(ENCODERS),
        "connectors": _first_lines(CONNECTORS),
        "decoders": dict.fromkeys(DECODER_FAMILIES, "a Hugging Face decoder, by its model_type"),
        "models to adopt": {name: _first_line(type(adapter)) for name, adapter in ADAPTERS.items()},
        "data": _first_lines({cls.__name__: cls for cls in (HandwritingData, MultimodalData)}),
        "attention backends": dict.fromkeys(BACKEND_NAMES, ""),
    }


def _first_lines(classes: Mapping[str, type]) -> dict[str, str]:
    return {name: _first_line(cls) for name, cls in classes.items()}


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]
