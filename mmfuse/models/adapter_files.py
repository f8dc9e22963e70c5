"""Adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.

`peft.PeftModel.from_pretrained(base, folder)` loads them onto the class that the base has outside of mmfuse: an adopted
model's own, or `MultimodalLM`. Keys are checked both ways, since PEFT loads an adapter whose names do not fit without
an error, and it then does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfuse.errors import ConfigError
from mmfuse.models.lora import ADAPTER, AdapterPlan, check_same_keys, has_adapter, inject
from mmfuse.models.modeling import MultimodalLM

_PREFIX: Final = "base_model.model."


def outer_name(model: MultimodalLM, path: str) -> str:
    """The path of one of the model's modules in the class that the base has outside of mmfuse."""
    return path.removeprefix(_inside(model))


def save_adapter(model: MultimodalLM, folder: Path, plan: AdapterPlan, base: str | None = None) -> None:
    """Write the adapter of `model` and what trains in full.

    Args:
        model: with an adapter.
        folder: is made if it is missing.
        plan: what trains.
        base: folder or hub name of the model that the adapter belongs on, for `base_model_name_or_path`.

    Raises:
        ConfigError: a parameter that trains outside of modules that PEFT could save.
    """
    config: Any = cast(Any, model.peft_config)[ADAPTER]
    options = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True, "task_type": None}
    options["target_modules"] = [outer_name(model, path) for path in plan.linear]
    options["modules_to_save"] = [outer_name(model, path) for path in plan.full] or None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_weights(model, plan), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    kept = {key: value for key, value in options.items() if key not in _FOUND_BY_PEFT}
    LoraConfig(**kept).save_pretrained(str(folder))


#: Fields of a saved config that PEFT writes itself.
_FOUND_BY_PEFT = ("peft_type", "auto_mapping", "peft_version")


def adapter_weights(model: MultimodalLM, plan: AdapterPlan) -> dict[str, Tensor]:
    """What an adapter file holds, by PEFT's keys."""
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    for path in plan.full:
        own |= {f"{path}.{name}": value for name, value in model.get_submodule(path).state_dict().items()}
    return {_PREFIX + outer_name(model, name): value.detach().cpu().contiguous() for name, value in own.items()}


def load_adapter(model: MultimodalLM, folder: Path) -> AdapterPlan:
    """Attach the adapter in `folder` and load its weights.

    Args:
        model: with the base's weights; an adapter that it has already must be of the same kind.
        folder: as `save_adapter` or PEFT wrote it.

    Returns:
        What the adapter trains.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ConfigError: the adapter is no LoRA, or does not fit the model; nothing would be loaded in silence.
    """
    config, weights = _read(folder)
    given = _inner_keys(model, folder, weights)
    modules = dict(model.named_modules())
    saved = [_inner_name(model, name) for name in config.modules_to_save or []]
    full = tuple(path for path in modules if any(path == name or path.endswith(f".{name}") for name in saved))
    config.modules_to_save = None
    if not has_adapter(model):
        _name_inside(model, config)
        try:
            inject(model, config, AdapterPlan((), full))
        except ValueError as error:
            raise ConfigError(f"{folder}: the adapter does not fit the model: {error}") from error
    linear = tuple(path for path, module in model.named_modules() if hasattr(module, "lora_A"))
    plan = AdapterPlan(linear, full)
    expected = adapter_weights(model, plan)
    check_same_keys(folder, expected, {_PREFIX + outer_name(model, name) for name in given})
    for name, value in given.items():
        shape = expected[_PREFIX + outer_name(model, name)].shape
        if value.shape != shape:
            raise ConfigError(f"{folder}: {name} has shape {list(value.shape)}, the model takes {list(shape)}")
    model.load_state_dict(_with_adapter_name(given, full), strict=False)
    return plan


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: this is no adapter: it holds no {name}")
    settings: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{folder}: mmfuse loads LoRA and its kin, this adapter is a {settings.get('peft_type')}")
    try:
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except SafetensorError as error:
        raise ConfigError(f"{folder / SAFETENSORS_WEIGHTS_NAME}: the file is damaged ({error})") from error
    return LoraConfig.from_pretrained(str(folder)), weights


def _inside(model: MultimodalLM) -> str:
    """What the paths of modules have in front here, and do not have in the base's own class."""
    return "vlm." if hasattr(model, "vlm") else ""


def _inner_name(model: MultimodalLM, path: str) -> str:
    """The path here of what has the name `path` in the base's own class; a strategy's own modules have no other."""
    return path if path.partition(".")[0] == "fusion" else _inside(model) + path


def _name_inside(model: MultimodalLM, config: LoraConfig) -> None:
    """Name the targets of a saved config as the modules are named here."""
    prefix = _inside(model)
    if isinstance(config.target_modules, str):
        config.target_modules = f"{prefix.replace('.', chr(92) + '.')}(?:{config.target_modules})"


def _inner_keys(model: MultimodalLM, folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for key in weights:
        if not key.startswith(_PREFIX):
            raise ConfigError(f"{folder}: {key} is no key of PEFT's, which begin with {_PREFIX}")
    return {_inner_name(model, key.removeprefix(_PREFIX)): value for key, value in weights.items()}


def _with_adapter_name(weights: Mapping[str, Tensor], full: tuple[str, ...]) -> dict[str, Tensor]:
    """Keys of PEFT's file to those of a module: `lora_A.weight` to `lora_A.default.weight`."""
    named = {}
    for key, value in weights.items():
        if any(key.startswith(f"{path}.") for path in full):
            named[key] = value
        elif key.endswith("lora_magnitude_vector"):
            named[f"{key}.{ADAPTER}.weight"] = value
        else:
            module, _, last = key.rpartition(".")
            named[f"{module}.{ADAPTER}.{last}"] = value
    return named
