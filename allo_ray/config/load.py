"""From a YAML file and `--set` overrides to a validated `RunConfig`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from allo_ray.config.base import Section
from allo_ray.config.run import RunConfig
from allo_ray.errors import UserError

Config = TypeVar("Config", bound=Section)

PRESETS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def presets() -> list[str]:
    """Names of the configs that come with the program."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """`load_as` for the config of a run."""
    return load_as(RunConfig, source, overrides)


def load_as(kind: type[Config], source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, or a preset by its name, and applies overrides such as `learn.k=0.1`.

    A file may name another one by `extends: <preset or path>`; its own keys then replace those, section by section.

    Raises:
        UserError: the file cannot be read, is no YAML, or a key or value is wrong; names each of them.
    """
    values = _read(source, seen=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override}: write it as section.key=value, for example --set learn.k=0.1")
        values = _merge(values, _nest(key.split("."), _scalar(text, override)))
    return _validated(kind, values, str(source))


def change(config: RunConfig, values: Mapping[str, Any], source: str) -> RunConfig:
    """A copy with other values; keys are fields by their dotted names, or sections. `source` is named in errors.

    Raises:
        UserError: a field is unknown, or a value is outside its bounds.
    """
    told = json.loads(config.model_dump_json())
    for key, value in values.items():
        told = _merge(told, _nest(key.split("."), value))
    return _validated(RunConfig, told, source)


def dump(config: Section) -> str:
    """The resolved config as YAML, every default spelled out; `load` reads it back unchanged."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def _read(source: str | Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = Path(source)
    if not path.suffix and not path.exists():
        path = PRESETS / f"{source}.yaml"
        if not path.exists():
            raise UserError(f"{source}: no such file, and no such preset. Presets: {', '.join(presets())}")
    if path in seen:
        raise UserError(f"{path}: extends itself, by way of {', '.join(map(str, seen))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Check --config.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected sections such as `model:` and `data:`, found {type(values).__name__}"
        )
    base = values.pop("extends", None)
    if base is None:
        return values
    beside = path.parent / str(base)
    return _merge(_read(beside if beside.is_file() else base, (*seen, path)), values)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`, section by section; a null removes a section."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _validated(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_place(item['loc'])}: {_reason(item)}" for item in error.errors()]
        raise UserError(f"{source}: the config has {len(lines)} error(s)\n" + "\n".join(lines)) from None


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: value if len(keys) == 1 else _nest(keys[1:], value)}


def _scalar(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is no valid YAML: {error}") from None


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "(whole config)"


def _reason(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown key. Check its spelling and its section."
    if item["type"] == "missing":
        return "is missing"
    message = item["msg"].removeprefix("Value error, ")
    return message if isinstance(item["input"], dict) else f"{message} (found {item['input']!r})"
