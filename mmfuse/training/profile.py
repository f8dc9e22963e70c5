"""`mmfuse profile`: what strategies cost in a config's model, at any shape and without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from mmfuse.analysis.latency import Latency, measure_latency
from mmfuse.analysis.profile import Profile, profile_model
from mmfuse.analysis.workload import medium
from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.errors import ConfigError, unknown
from mmfuse.fusion import FUSIONS
from mmfuse.models import MultimodalLM, NetworkSpec, build_network
from mmfuse.training.cli import resolved_settings
from mmfuse.training.commands import StrictParser

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BASELINE = "causal"

SHARED = ("encoder_flops", "connector_flops", "lm_head_flops", "lm_head_last_flops")


def main(argv: Sequence[str]) -> int:
    """Run the command; `argv` begins with its name."""
    options, overrides = _parser().parse_with_overrides(argv[1:])
    spec = network_spec([*(word for config in options.config for word in ("--config", config)), *overrides])
    models = {
        name: bare_model(replace(spec, fusion=fusion), DTYPES[options.dtype])
        for name, fusion in fusions(options.fusion, spec).items()
    }
    first = next(iter(models.values()))
    if options.visual_tokens is None:
        options.visual_tokens = first.visual_tokens(medium(first)) if first.encoders else 0
    counts = (options.text_tokens, options.visual_tokens)
    profiles = {name: profile_model(model, *counts, batch=options.batch) for name, model in models.items()}
    timed = models if options.latency else {}
    latencies = {name: measure_latency(model, *counts, batch=options.batch) for name, model in timed.items()}
    shape = {"text_tokens": options.text_tokens, "visual_tokens": options.visual_tokens, "batch": options.batch}
    if options.json:
        print(json.dumps(document(profiles, latencies, {**shape, "dtype": options.dtype}), indent=2))
        return 0
    console = Console(highlight=False)
    console.print("{visual_tokens} visual + {text_tokens} text tokens × {batch}, ".format(**shape) + options.dtype)
    console.print(costs_table(profiles))
    console.print(parts_table(next(iter(profiles.values())), medium(first)))
    if latencies:
        console.print(latency_table(latencies))
    return 0


def _parser() -> StrictParser:
    parser = StrictParser("profile", "FLOPs, parameters, cache and activation memory of a config, at any shape.")
    parser.add_argument("--config", action="append", required=True, help="a config; repeat to overlay")
    parser.add_argument("--visual-tokens", type=int, metavar="N", help="of a sample (default: those of one image)")
    parser.add_argument("--text-tokens", type=int, default=64, metavar="N", help="of a sample (default: 64)")
    parser.add_argument("--fusion", metavar="A,B,…", help="strategies to show (default: all, causal first)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="samples (default: 1)")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="bfloat16", help="of all tensors (default: bfloat16)"
    )
    parser.add_argument("--latency", action="store_true", help="also run the decoder, with random weights, and time it")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


# Models


def network_spec(words: Sequence[str]) -> NetworkSpec:
    """The network of a config, checked as strictly as `fit` checks it."""
    spec = NetworkSpec(**resolved_settings(words)["model"]["network"])
    if spec.vlm is not None:
        raise ConfigError("profile counts models that a config builds from parts; this one is adopted (network.vlm)")
    return spec if spec.fusion is not None else replace(spec, fusion="causal")


def fusions(asked: str | None, spec: NetworkSpec) -> dict[str, str | dict[str, Any]]:
    """The strategies to show by name, all of them if none are `asked` for; the config's own with its settings.

    Raises:
        ConfigError: a name that no strategy has.
    """
    assert spec.fusion is not None
    own = spec.fusion if isinstance(spec.fusion, str) else str(spec.fusion.get("type"))
    names = list(dict.fromkeys([BASELINE, own, *FUSIONS])) if asked is None else [n.strip() for n in asked.split(",")]
    for name in names:
        if name not in FUSIONS:
            raise ConfigError(unknown("fusion", name, FUSIONS))
    return {name: spec.fusion if name == own else name for name in names}


def bare_model(spec: NetworkSpec, dtype: torch.dtype) -> MultimodalLM:
    """A model on the meta device; nothing is read from the hub if the config says what its parts are."""
    with torch.device("meta"):
        # Only its length could matter, to a decoder whose config leaves its vocabulary open.
        model, _ = build_network(spec, load_tokenizer())
    return model.to(dtype)  # type: ignore[arg-type]


# Output


def document(
    profiles: Mapping[str, Profile], latencies: Mapping[str, Latency], shape: Mapping[str, Any]
) -> dict[str, Any]:
    """What `--json` prints: FLOPs and bytes of the whole batch as integers, times in seconds."""
    strategies = {}
    for name, profile in profiles.items():
        fields = {key: value for key, value in asdict(profile).items() if key not in SHARED}
        parts = fields.pop("parameters")
        strategies[name] = {**fields, "parameters": sum(parts.values()), "parameters_by_part": parts}
        if name in latencies:
            strategies[name]["latency"] = asdict(latencies[name])
    first = next(iter(profiles.values()))
    return {"strategies": strategies, "shape": dict(shape), **{key: getattr(first, key) for key in SHARED}}


def costs_table(profiles: Mapping[str, Profile]) -> Table:
    """A row for each strategy; its FLOPs also in comparison with the first row."""
    first = next(iter(profiles.values()))
    unit = FlopsUnit.for_count(first.convention_flops)
    table = Table(box=None, pad_edge=False)
    table.add_column("strategy")
    for title in (f"convention\n{unit.name}", f"executed\n{unit.name}", "KV cache", "params", "activations"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, profile in profiles.items():
        convention, executed = unit.show(profile.convention_flops), unit.show(profile.executed_flops)
        if profile is not first:
            convention += _change(profile.convention_flops, first.convention_flops)
            executed += _change(profile.executed_flops, first.executed_flops)
        memory = _bytes(profile.kv_bytes), _count(sum(profile.parameters.values())), _bytes(profile.activation_bytes)
        table.add_row(name, convention, executed, *memory)
    return table


def parts_table(profile: Profile, modality: str) -> Table:
    """What stands beside the decoder's layers and is the same for all strategies."""
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = {
        "encoder": (profile.encoder_flops, f"one {modality}"),
        "connector": (profile.connector_flops, f"one {modality}"),
        "lm_head": (profile.lm_head_flops, "all text tokens"),
        "lm_head, decoding": (profile.lm_head_last_flops, "the last token of each sample"),
    }
    for part, (count, what) in rows.items():
        if count:
            unit = FlopsUnit.for_count(count)
            table.add_row(part, f"{unit.show(count)} {unit.name}", what)
    return table


def latency_table(latencies: Mapping[str, Latency]) -> Table:
    """Milliseconds of each strategy."""
    first = next(iter(latencies.values()))
    table = Table(box=None, pad_edge=False, title=f"{first.device}, median of {first.runs}", title_justify="left")
    table.add_column("strategy")
    table.add_column("prefill", justify="right")
    table.add_column("one more token", justify="right")
    for name, latency in latencies.items():
        table.add_row(name, f"{1e3 * latency.prefill_seconds:.1f} ms", f"{1e3 * latency.decode_seconds:.1f} ms")
    return table


class FlopsUnit(NamedTuple):
    """A power of ten and what FLOPs are called in it."""

    scale: int
    name: str

    @classmethod
    def for_count(cls, count: int) -> FlopsUnit:
        """The largest unit of which there is at least a tenth."""
        units = (cls(10**12, "TFLOPs"), cls(10**9, "GFLOPs"), cls(10**6, "MFLOPs"))
        return next((unit for unit in units if 10 * count >= unit.scale), units[-1])

    def show(self, count: int) -> str:
        return f"{count / self.scale:.2f}"


def _change(count: int, base: int) -> str:
    return f" ({100 * (count / base - 1):+.1f} %)".replace("-", "−")


def _bytes(count: int) -> str:
    for power, name in ((3, "GiB"), (2, "MiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.4g} {name}"
    return f"{count / 1024:.4g} KiB"


def _count(count: int) -> str:
    for scale, name in ((10**9, "B"), (10**6, "M")):
        if count >= scale:
            return f"{count / scale:.2f} {name}"
    return f"{count:,}"
