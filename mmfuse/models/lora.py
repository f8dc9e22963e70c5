"""Adapters by PEFT: which weights of a model train, and which stay as they are, to the bit.

LoRA (arXiv 2106.09685), DoRA (2402.09353), rsLoRA (2312.03732), and QLoRA (2305.14314) over 4-bit weights of the
decoder. The layers are PEFT's own and stand inside the model, so the layer loop, caches and strategies see no
difference. Unlike PEFT's `modules_to_save`, modules that train in full are trained in place and not copied; what is
saved is PEFT's format (`mmfuse.models.adapter_files`).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Literal, cast, get_args

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmfuse.errors import ConfigError, unknown
from mmfuse.models.modeling import MultimodalLM

Kind = Literal["lora", "dora", "rslora", "qlora"]
BaseDtype = Literal["float32", "bfloat16"]

#: The name that PEFT gives to an adapter which is not named.
ADAPTER: Final = "default"
_LORA: Final = "lora_"
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class AdapterSpec:
    """Which adapter a model is tuned with, in PEFT's terms.

    Attributes:
        kind: `lora`, `dora`, `rslora`, or `qlora`: LoRA over a decoder in 4 bits (needs `mmfuse[qlora]`).
        r: rank.
        alpha: scale; the update is multiplied by `alpha / r`, in rsLoRA by `alpha / sqrt(r)`.
        dropout: of the adapter's inputs.
        targets: `decoder.attention`, `decoder.mlp`, `decoder` (both), `connector`, `encoder`, `encoder.image` and
            other modalities, or names of modules, whole or their last parts, as in PEFT (`q_proj`). The linear layers
            in them get the adapter.
        modules_to_save: names of modules that train in full beside it, such as `lm_head`. A part that a stage trains
            and that `targets` leaves out trains in full, too, and need not stand here.
        base_dtype: of the weights that do not train. `bfloat16` halves their memory and needs a `trainer.precision`
            of `bf16-mixed`; what trains stays in float32.
    """

    kind: Kind = "lora"
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["decoder.attention", "decoder.mlp"])
    modules_to_save: list[str] = field(default_factory=list)
    base_dtype: BaseDtype = "float32"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(unknown("adapter kind", self.kind, get_args(Kind)))
        if self.base_dtype not in get_args(BaseDtype):
            raise ConfigError(unknown("adapter base_dtype", self.base_dtype, get_args(BaseDtype)))
        if self.r < 1:
            raise ConfigError(f"adapter: r is a rank and must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter: dropout must lie in 0..1, got {self.dropout}")
        if not self.targets:
            raise ConfigError("adapter: targets is empty; leave `adapter` out to train parts in full")


@dataclass(frozen=True)
class AdapterPlan:
    """What trains in a model, by the paths of its modules.

    Attributes:
        linear: linear layers that get an adapter.
        full: modules that train in full.
    """

    linear: tuple[str, ...]
    full: tuple[str, ...]


def plan_adapter(model: MultimodalLM, spec: AdapterSpec, trained_parts: Sequence[str]) -> AdapterPlan:
    """Find what `spec` names in a model.

    Args:
        model: without an adapter.
        spec: what is asked for.
        trained_parts: the parts (see `MultimodalLM.parts`) that some stage trains.

    Raises:
        ConfigError: a name that the model does not have, a target in a part that no stage trains, or a module that is
            to be trained in two ways.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    linear = dict.fromkeys(chain.from_iterable(_linear_layers(model, name, paths) for name in spec.targets))
    full = list(chain.from_iterable(_named(model, name, "modules_to_save") for name in spec.modules_to_save))
    parts = {part: {id(inner) for inner in module.modules()} for part, module in model.parts().items()}
    modules = dict(model.named_modules())
    targeted, saved = (
        {part for part, own in parts.items() if any(id(modules[path]) in own for path in named)}
        for named in (linear, full)
    )
    for key, found in (("targets", targeted), ("modules_to_save", saved)):
        for part in sorted(found - set(trained_parts)):
            raise ConfigError(f"adapter: {key} names the {part}, which no stage trains: give it a learning rate in lr")
    for part in trained_parts:
        if part not in targeted | saved:
            full += [paths[id(module)] for module in _roots(model.parts()[part], paths)]
    if "connector" in targeted and any(True for _ in model.fusion.parameters()):
        raise ConfigError(
            f"adapter: {type(model.fusion).__name__} starts its projectors from the connector, which must train in "
            "full; take `connector` out of targets"
        )
    _check_apart(list(linear), full)
    _check_tied(model, full)
    return AdapterPlan(tuple(linear), tuple(dict.fromkeys(full)))


def attach_adapter(model: MultimodalLM, spec: AdapterSpec, plan: AdapterPlan) -> None:
    """Put the adapter into `model`, in place, and let nothing train but what the plan names.

    Raises:
        ConfigError: `qlora` without bitsandbytes.
    """
    if spec.kind == "qlora":
        quantize_decoder(model, plan.full)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(plan.linear),
        use_dora=spec.kind == "dora",
        use_rslora=spec.kind == "rslora",
    )
    inject(model, config, plan)
    if spec.base_dtype == "bfloat16":
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()


def inject(model: MultimodalLM, config: LoraConfig, plan: AdapterPlan) -> None:
    """Put PEFT's layers into `model`; they and what the plan trains in full are what has gradients afterwards."""
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    modules = dict(model.named_modules())
    for path in plan.full:
        modules[path].requires_grad_(True)


def has_adapter(model: nn.Module) -> bool:
    """Whether some layer of `model` carries an adapter."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def remove_adapter(model: nn.Module, *, merge: bool) -> None:
    """Take the adapter out of `model`, in place; with `merge`, into the weights that it stood on.

    Raises:
        ConfigError: merging makes weights that are not finite, or would round to 4 bits.
    """
    for path, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if merge:
            _merge(module, path)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _merge(module: BaseTunerLayer, path: str) -> None:
    if type(module.get_base_layer()) is not nn.Linear:
        raise ConfigError(f"{path} has 4-bit weights, and merging would round again: merge into the unquantized model")
    try:
        module.merge(safe_merge=True)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def base_fingerprint(model: MultimodalLM, plan: AdapterPlan) -> str:
    """A hash of up to 64 values of each weight that stays as it is; to be taken before the adapter is attached."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"{path}.") for path in plan.full):
            continue
        values = parameter.detach().flatten()
        step = max(1, values.numel() // 64)
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(values[::step][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def quantize_decoder(model: MultimodalLM, keep: Iterable[str] = ()) -> None:
    """Replace the linear layers in the decoder's layers by 4-bit ones (NF4, double quantization), in place.

    The weights are quantized when they are moved to their device.

    Args:
        model: whose head and embeddings, connectors and encoders keep their precision.
        keep: paths of modules that train in full and keep theirs.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("adapter: kind `qlora` needs bitsandbytes: pip install 'mmfuse[qlora]'")
    import bitsandbytes

    paths = {id(module): path for path, module in model.named_modules()}
    for linear in _layer_modules(model, ("self_attn", "mlp")):
        path = paths[id(linear)]
        if any(f"{path}.".startswith(f"{kept}.") for kept in keep):
            continue
        small = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
        )
        small.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        small.bias = linear.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, small.to(linear.weight.device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT chooses its layers by


def trained_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict whose parameters train."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in names}


def check_trained_state(where: object, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless `state` holds exactly what trains in `model`."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_same_keys(where, names, state)


def check_same_keys(where: object, expected: Iterable[str], given: Iterable[str]) -> None:
    """Raise ConfigError for keys that are missing or that the model does not have, with the first of each."""
    wanted, there = set(expected), set(given)
    missing, unexpected = sorted(wanted - there), sorted(there - wanted)
    if missing or unexpected:
        examples = [f"{name} {found[0]}" for name, found in (("no", missing), ("unknown", unexpected)) if found]
        raise ConfigError(
            f"{where}: the adapter does not fit the model: {len(missing)} weights are missing and {len(unexpected)} "
            f"are unexpected ({', '.join(examples)}); loaded as it is, it would do nothing or a part of its work"
        )


def _linear_layers(model: MultimodalLM, target: str, paths: Mapping[int, str]) -> list[str]:
    """Paths of the linear layers that one of `targets` names."""
    in_layers = {"decoder.attention": ("self_attn",), "decoder.mlp": ("mlp",), "decoder": ("self_attn", "mlp")}
    roots: list[nn.Module] = list(model.encoders.values())
    if target in in_layers:
        found = list(_layer_modules(model, in_layers[target]))
    elif target in ("encoder", "connector"):
        found = list(_linear_in(roots if target == "encoder" else [model.parts()["connector"]]))
    elif target.startswith("encoder."):
        name = target.removeprefix("encoder.")
        if name not in model.encoders:
            raise ConfigError(f"adapter: {unknown('encoder in targets', name, model.encoders)}")
        found = list(_linear_in([model.encoders[name]]))
    else:
        modules = dict(model.named_modules())
        found = list(_linear_in(modules[path] for path in _named(model, target, "targets")))
    if not found:
        raise ConfigError(f"adapter: {target} in targets holds no linear layers")
    return [paths[id(linear)] for linear in found]


def _layer_modules(model: MultimodalLM, names: Iterable[str]) -> Iterator[nn.Linear]:
    """The linear layers in these modules of each decoder layer."""
    for layer in cast(Any, model.decoder).model.layers:
        yield from _linear_in(getattr(layer, name) for name in names)


def _linear_in(modules: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    # Not subclasses: `nn.MultiheadAttention` reads the weight of its own without calling the layer.
    for module in modules:
        yield from (inner for inner in module.modules() if type(inner) is nn.Linear)


def _named(model: MultimodalLM, name: str, key: str) -> list[str]:
    """Paths of the modules whose path is `name` or ends with it."""
    found = [path for path, _ in model.named_modules() if path == name or path.endswith(f".{name}")]
    if not found:
        parts = ["decoder.attention", "decoder.mlp", "decoder", "connector", "encoder"]
        parts += [f"encoder.{modality}" for modality in model.encoders]
        last = {path.rpartition(".")[2] for path, module in model.named_modules() if type(module) is nn.Linear}
        options = [*parts, *last] if key == "targets" else last
        raise ConfigError(f"adapter: {unknown(f'module in {key}', name, options)}")
    return found


def _roots(module: nn.Module, paths: Mapping[int, str]) -> list[nn.Module]:
    """The fewest modules of the model that hold the parameters of `module`, and are no containers."""
    if not any(True for _ in module.parameters()):
        return []
    if id(module) in paths and not isinstance(module, _CONTAINERS):
        return [module]
    return list(chain.from_iterable(_roots(child, paths) for child in module.children()))


def _check_apart(linear: Sequence[str], full: Sequence[str]) -> None:
    for path in linear:
        for other in full:
            if f"{path}.".startswith(f"{other}."):
                raise ConfigError(f"adapter: {path} is in targets, and {other}, which holds it, is to train in full")


def _check_tied(model: MultimodalLM, full: Sequence[str]) -> None:
    """PEFT would save one end of a tied weight and leave the other at the base."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight is not embeddings:
        return
    modules = dict(model.named_modules())
    for path in full:
        if any(weight is embeddings for weight in modules[path].parameters()):
            raise ConfigError(
                f"adapter: {path} holds embeddings that are tied to the head; an adapter cannot hold weights of both"
            )
