"""Nested frozen dataclasses from TOML and from `key=value`: every key known, every value typed."""

import dataclasses
import tomllib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from zaya_jax.errors import ConfigError


def build[T](kind: type[T], values: Any, where: str = "") -> T:
    """A dataclass from what TOML or JSON gives for it.

    Args:
      kind: a dataclass, whose fields are numbers, strings, booleans, literals, optional ones of
        these, tuples of one kind, or dataclasses.
      values: a mapping of field names; those that are left out have their defaults.
      where: the path of `values` in the whole, for messages.

    Raises:
      ConfigError: naming a key that is unknown or missing, or whose value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the configuration'} must be a table, got {values!r:.80}")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown key {_join(where, name)!r}: one of {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and _required(field):
            raise ConfigError(f"missing key {_join(where, name)!r}")
    return kind(**{name: _typed(hints[name], v, _join(where, name)) for name, v in values.items()})


def assign(values: dict[str, Any], assignment: str) -> None:
    """Sets one value of nested tables in place, as in "optimizer.learning_rate=1e-3" or
    "data.sources.0.weight=2"; a value that is not TOML is a string.

    Raises:
      ConfigError: not of that form, or a path through something that is no table.
    """
    path, equals, text = assignment.partition("=")
    *parents, last = path.strip().split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"--set {assignment!r}: write it like optimizer.learning_rate=1e-3")
    place: Any = values
    for name in parents:
        if isinstance(place, list):
            place = place[_index(place, name, assignment)]
        elif isinstance(place, dict):
            place = place.setdefault(name, {})
    if isinstance(place, list):
        place[_index(place, last, assignment)] = _parse(text)
    elif isinstance(place, dict):
        place[last] = _parse(text)
    else:
        raise ConfigError(f"--set {assignment!r}: {'.'.join(parents)} is no table")


def plain(config: Any) -> Any:
    """A dataclass as what JSON and `build` take: mappings, lists, and what stands in them. Fields
    that are None are left out, as TOML has no word for it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        pairs = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return {name: plain(value) for name, value in pairs.items() if value is not None}
    return [plain(value) for value in config] if isinstance(config, tuple) else config


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _index(place: Sequence[Any], name: str, assignment: str) -> int:
    if not name.isdecimal() or int(name) >= len(place):
        raise ConfigError(f"--set {assignment!r}: there is no entry {name} among {len(place)}")
    return int(name)


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        if value is None:
            return None
        (hint,) = (argument for argument in arguments if argument is not types.NoneType)
        return _typed(hint, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r:.80}")
        return tuple(_typed(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be of type {hint.__name__}, got {value!r:.80}")
    return value
