"""Turns a mistake in a config or a flag into a sentence that says what was probably meant.

jsonargparse names the key that it does not know, at best. This module walks the same type hints that jsonargparse
parses by, and finds the first key, class name or flag that they do not have.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from mmfuse.training.imports import explain_denied, is_allowed

#: Key names to type hints; None where anything goes.
Schema = Mapping[str, Any]


def explain_mistake(message: str, schema: Schema, words: Sequence[str]) -> str:
    """The first unknown name in the config files and flags of `words`; the parser's own `message` if there is none.

    Args:
        message: what the parser said.
        schema: the keys of a config's top level and their type hints.
        words: the words after the subcommand.
    """
    denied = explain_denied(message)
    if denied != message:
        return denied
    for file in config_files(words):
        try:
            settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            return f"{file}: {error.strerror}"
        except yaml.YAMLError as error:
            return f"{file}: {error}"
        if not isinstance(settings, dict):
            return f"{file}: a config is a mapping of keys to values, found {type(settings).__name__}"
        found = _unknown_in(settings, schema, "")
        if found:
            return f"{file}: {found}"
    mistake = unknown_flag(schema, words)
    if mistake:
        return mistake
    if not config_files(words):
        return f"no --config is given (configs/aki.yaml is a start), and without one: {message}"
    return message


def unknown_flag(schema: Schema, words: Sequence[str]) -> str | None:
    """The first flag of `words` that does not exist, in words; None if all do.

    Asked before parsing, too: jsonargparse takes abbreviations for the arguments of a class, whatever it is told.
    """
    for flag, value in _flags(words):
        found = _unknown_flag(flag, schema) or _unknown_class_in_flag(flag, value, schema)
        if found:
            return found
    return None


def config_files(words: Sequence[str]) -> list[str]:
    """The values of `--config`."""
    return [value for flag, value in _flags(words) if flag in ("--config", "-c")]


def _flags(words: Sequence[str]) -> list[tuple[str, str]]:
    """Flags with their values, written as `--flag value` or `--flag=value`."""
    pairs = []
    for number, word in enumerate(words):
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            pairs.append((flag, value if equals else "".join(words[number + 1 : number + 2])))
    return pairs


def _unknown_class_in_flag(flag: str, value: str, schema: Schema) -> str | None:
    """A class that `--data NAME` or `--data.class_path NAME` does not find."""
    key = flag.removeprefix("--").removesuffix(".class_path")
    if key not in schema or value.startswith(("-", "{", "[", ".")) or Path(value).exists():
        return None
    hint = schema[key]
    if _is_scalar(hint) or _is_of_others(value) or find_class(value, hint) is not None:
        return None
    meant = _closest(value.rsplit(".", 1)[-1], class_names(hint))
    return f"{flag}: unknown class {value!r}" + (f": did you mean {meant!r}?" if meant else "")


def _is_scalar(hint: Any) -> bool:
    return hint in (int, str, bool, float) or get_origin(hint) is not None or any(map(_is_group, _classes(hint)))


def _unknown_flag(word: str, schema: Schema) -> str | None:
    if not word.startswith("--") or word == "--":
        return None
    flag = word[2:].removesuffix("+").replace(".init_args.", ".")
    path: list[str] = []
    known = schema
    for name in flag.split("."):
        if name not in known:
            there = ["config", "help", "print_config", *known] if not path else list(known)
            if name in there:
                return None
            meant = _closest(name, there)
            better = ".".join(["--" + ".".join([*path, meant])]) if meant else None
            return f"unknown option --{flag}" + (f": did you mean {better}?" if better else f". Known: {_some(there)}")
        path.append(name)
        inside = _keys_of(known[name], None) or _keys_of_subclasses(known[name])
        if inside is None:
            return None
        known = inside
    return None


def _keys_of_subclasses(hint: Any) -> Schema | None:
    """What may follow a key whose value is any subclass of the hint: its path, and the arguments of all of them."""
    if _is_scalar(hint) or not _classes(hint):
        return None
    arguments: dict[str, Any] = {}
    for cls in class_names(hint).values():
        arguments |= _parameters(cls)
    return {"class_path": str, "init_args": None, "help": str, **arguments}


def _unknown_in(value: Any, schema: Schema, path: str) -> str | None:
    """The first unknown key or class in the mapping `value`."""
    for key, inner in value.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in schema:
            meant = _closest(str(key), schema)
            hint = f": did you mean {meant!r}?" if meant else "."
            return f"unknown key {where!r}{hint} Known{' in ' + repr(path) if path else ''}: {_some(schema)}"
        found = _unknown_below(inner, schema[key], where)
        if found:
            return found
    return None


def _unknown_below(value: Any, hint: Any, path: str) -> str | None:
    if isinstance(value, list):
        inner = _item_hint(hint, (list, tuple, Sequence, Iterable))
        found = (_unknown_below(item, inner, f"{path}[{number}]") for number, item in enumerate(value))
        return next(filter(None, found), None)
    if not isinstance(value, dict):
        return None
    if "class_path" in value:
        return _unknown_in_class(value, hint, path)
    inner = _item_hint(hint, (dict, Mapping))
    if inner is not None:
        found = (_unknown_below(item, inner, f"{path}.{key}") for key, item in value.items())
        return next(filter(None, found), None)
    known = _keys_of(hint, None)
    return None if known is None else _unknown_in(value, known, path)


def _unknown_in_class(value: dict[str, Any], hint: Any, path: str) -> str | None:
    name = str(value["class_path"])
    found = find_class(name, hint)
    if found is None:
        if _is_of_others(name):
            return None
        meant = _closest(name.rsplit(".", 1)[-1], class_names(hint))
        return f"{path}: unknown class {name!r}" + (f": did you mean {meant!r}?" if meant else "")
    known = _keys_of(found, found) or {}
    return _unknown_in(value.get("init_args") or {}, known, f"{path}.init_args")


def _is_of_others(name: str) -> bool:
    """Whether the parser alone can say if there is such a class: it lies in a module that is not imported here."""
    module = name.rpartition(".")[0]
    return bool(module) and not is_allowed(name) and module not in sys.modules


def find_class(name: str, hint: Any) -> type | None:
    """The class with a dotted path, or a subclass of the hint's classes by its plain name.

    Only what every config may import is imported here; of other modules, those are known that the parser has imported.
    """
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            loaded = importlib.import_module(module) if is_allowed(name) else sys.modules.get(module)
        except ImportError:
            return None
        found = getattr(loaded, attribute, None)
        return found if isinstance(found, type) else None
    return class_names(hint).get(name)


def class_names(hint: Any) -> dict[str, type]:
    """The classes that a hint allows, and all imported subclasses of them, by name."""
    found: dict[str, type] = {}
    waiting = [cls for cls in _classes(hint) if not cls.__module__.startswith("builtins")]
    while waiting:
        cls = waiting.pop()
        found[cls.__name__] = cls
        waiting += type.__subclasses__(cls)
    return found


def _keys_of(hint: Any, cls: type | None) -> Schema | None:
    """The keys that a value of this type has, or None if it is no class with keys."""
    candidates = [cls] if cls is not None else [c for c in _classes(hint) if is_dataclass(c) or _is_group(c)]
    if not candidates:
        return None
    keys: dict[str, Any] = {}
    for candidate in candidates:
        keys |= _parameters(candidate)
    return keys


def _is_group(cls: type) -> bool:
    """Classes whose parameters stand in the config without `init_args`."""
    return cls.__name__ in ("Trainer", "MultimodalModule")


def _parameters(cls: type) -> dict[str, Any]:
    signature = inspect.signature(cls)
    try:
        hints = get_type_hints(vars(cls).get("__init__", cls))
    except (NameError, TypeError):
        hints = {}
    return {
        name: hints.get(name)
        for name, parameter in signature.parameters.items()
        if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _classes(hint: Any) -> list[type]:
    if isinstance(hint, type) and get_origin(hint) is None:
        return [hint]
    if get_origin(hint) in (Union, types.UnionType):
        return [cls for part in get_args(hint) for cls in _classes(part)]
    return [cls for part in get_args(hint) for cls in _classes(part)] if get_origin(hint) in (list, tuple) else []


def _item_hint(hint: Any, containers: tuple[Any, ...]) -> Any:
    """What a container of the hint holds: the last argument of `list[X]`, `dict[str, X]`, also inside a union."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for part in parts:
        origin = get_origin(part)
        if isinstance(origin, type) and issubclass(origin, tuple(c for c in containers if isinstance(c, type))):
            return get_args(part)[-1] if get_args(part) else None
    return None


def _closest(name: str, options: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)), None)


def _some(options: Iterable[str], most: int = 24) -> str:
    names = list(options)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
