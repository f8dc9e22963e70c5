"""What is compared: strategies by name or as a config file, and the check that nothing else differs between them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfuse.errors import ConfigError, unknown
from mmfuse.fusion import FUSIONS
from mmfuse.models.adopt import NATIVE
from mmfuse.training.cli import resolved_settings

#: What a strategy's own file may change: the fusion, and how the parts of the model learn.
OWN_KEYS = re.compile(
    r"model\.network\.(fusion|attention_backend)\b|stages\[\d+\]\.(lr|fusion|warmup|decay|final_lr)\b"
)

#: What `compare` sets itself.
_SET_HERE = ("config", "out", "ckpt_path", "seed_everything", "model.network.fusion")

_ABSENT = object()


@dataclass(frozen=True)
class Strategy:
    """One row of the table.

    Attributes:
        label: its name, or that of its file.
        words: of `fit`, without seed and `--out`.
        settings: what they resolve to.
    """

    label: str
    words: tuple[str, ...]
    settings: Mapping[str, Any]


def resolve_strategies(text: str, configs: Sequence[str], assignments: Sequence[str] = ()) -> list[Strategy]:
    """The strategies of `--fusion`, with the settings that each resolves to.

    Args:
        text: names of `FUSIONS`, `native` for an adopted model, or YAML files that overlay the config, separated by
            commas.
        configs: files of `--config`.
        assignments: the values of `--set`.

    Raises:
        ConfigError: an unknown name, the same label twice, a file that changes more than the fusion, a mistake in the
            config, or a config without held-out questions.
        FileNotFoundError: a file of `--fusion` that is not there.
    """
    choices = parse_choices(text)
    common = [word for config in configs for word in ("--config", config)]
    changes = settings_words(assignments)
    config = resolved_settings([*common, *changes])
    if config["data"]["init_args"].get("test", _ABSENT) is None:
        raise ConfigError("data.init_args.test is not set: there are no held-out questions to compare strategies by")
    if NATIVE in choices and config["model"]["network"].get("vlm") is None:
        raise ConfigError(f"--fusion {NATIVE} is what an adopted model computes, and the config has no network.vlm")
    strategies = []
    for label, own in choices.items():
        # `--set` is the user's last word, also over a strategy's file.
        words = (*common, *own, *changes)
        strategies.append(Strategy(label, words, resolved_settings(words)))
        check_all_else_equal(own[-1], strategies[-1].settings, config)
    return strategies


def parse_choices(text: str) -> dict[str, tuple[str, str]]:
    """For the label of each strategy of `--fusion` the flag of `fit` that chooses it.

    Raises:
        ConfigError: an unknown name, the same label twice, or nothing.
        FileNotFoundError: a file that is not there.
    """
    choices: dict[str, tuple[str, str]] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        file = Path(entry)
        is_file = file.suffix in (".yaml", ".yml")
        if is_file and not file.is_file():
            raise FileNotFoundError(f"--fusion {entry}: there is no such file")
        if not is_file and entry not in (*FUSIONS, NATIVE):
            raise ConfigError(f"--fusion: {unknown('fusion', entry, (*FUSIONS, NATIVE))} (a file ends in .yaml)")
        label = file.stem if is_file else entry
        if label in choices:
            raise ConfigError(f"--fusion: two strategies are called {label!r}")
        choices[label] = ("--config", entry) if is_file else ("--model.network.fusion", entry)
    if not choices:
        raise ConfigError(f"--fusion names no strategy. Known: {', '.join(sorted(FUSIONS))}, or YAML files")
    return choices


def settings_words(assignments: Sequence[str]) -> list[str]:
    """The values of `--set KEY=VALUE` as flags of `fit`.

    Raises:
        ConfigError: no `=`, or a key that is not the user's to set here.
    """
    for assignment in assignments:
        key, equals, _ = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as --set model.ema_decay=0.99")
        if key.removeprefix("--") in _SET_HERE:
            raise ConfigError(f"--set {assignment}: `compare` sets {key} itself")
    return [f"--{assignment.removeprefix('--')}" for assignment in assignments]


def check_all_else_equal(name: str, own: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse a strategy whose file changes more than how it fuses and learns.

    Args:
        name: of the strategy or its file.
        own: its resolved settings.
        config: those of the config without it.

    Raises:
        ConfigError: naming the first other key that differs.
    """
    for key, mine, common in differences(own, config):
        if key != "out" and not OWN_KEYS.match(key):
            raise ConfigError(
                f"{name}: {key} is {mine} there and {common} in the config; strategies that are compared may differ "
                "in model.network.fusion, its attention backend, and the learning rates and fusions of the stages"
            )


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two settings differ: key such as `stages[0].steps`, and both values as text, in the order of `one`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in dict.fromkeys([*one, *other]):
            where = f"{key}.{name}" if key else str(name)
            yield from differences(one.get(name, _ABSENT), other.get(name, _ABSENT), where)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (mine, others) in enumerate(zip(one, other, strict=True)):
            yield from differences(mine, others, f"{key}[{number}]")
    elif one != other:
        yield key, _text(one), _text(other)


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
