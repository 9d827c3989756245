"""Options of a method: fields of its ``Config`` dataclass, declared once and checked wherever they come from."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def option(default: T, help: str, *, minimum: float | None = None, maximum: float | None = None) -> T:  # noqa: A002
    """A field of a ``Config``, with what it means and the closed range of a number.

    Args:
        default: the value where the user gives none.
        help: one line for ``--help`` and the documentation.
        minimum: the smallest number allowed; None = no limit.
        maximum: the largest number allowed.

    Returns:
        A dataclass field. (Typed as the default, as ``dataclasses.field`` is.)

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     epochs: int = option(10, "passes over the samples", minimum=1)
        >>> Config().epochs
        10
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum}
    field: T = dataclasses.field(default=default, metadata=metadata)
    return field


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """One option, for a command line or a page of documentation.

    Args:
        name: the field's name.
        type: the field's type as text; the choices where it is a ``Literal``.
        default: the value where the user gives none.
        help: what it means.
    """

    name: str
    type: str
    default: Any
    help: str


def describe(config_class: type[Any]) -> tuple[OptionInfo, ...]:
    """The options of a ``Config`` dataclass, in the order of its fields."""
    hints = get_type_hints(config_class)
    defaults = config_class()
    return tuple(
        OptionInfo(f.name, type_name(hints[f.name]), getattr(defaults, f.name), str(f.metadata.get("help", "")))
        for f in fields_of(config_class)
    )


def build(config_class: type[Any], options: Mapping[str, Any], *, owner: str) -> Any:
    """A ``Config`` with ``options`` in place of the defaults.

    Text is read as the field's type (command lines, and YAML's ``1e-4``, give text where a number is meant).

    Args:
        config_class: the dataclass.
        options: {field: value}.
        owner: whose options they are, for messages.

    Raises:
        ValueError: for an unknown option, or a value out of range.
        TypeError: for a value of another type.
    """
    known = {f.name: f for f in fields_of(config_class)}
    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{owner} has no option {name!r}{hint}; its options: {', '.join(known) or 'none'}")
        values[name] = checked(value, hints[name], known[name].metadata, f"{owner}: option {name}={value!r}")
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{owner}: {error}") from error


def fields_of(config_class: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields that a user can set."""
    return [f for f in dataclasses.fields(config_class) if f.init]


def checked(value: Any, kind: Any, metadata: Mapping[str, Any], where: str) -> Any:
    """``value`` as a ``kind`` within the range that the field's metadata gives."""
    result = convert(value, kind, where)
    low, high = metadata.get("minimum"), metadata.get("maximum")
    if isinstance(result, (int, float)) and not isinstance(result, bool):
        limits = [f"at least {low:g}"] if low is not None else []
        limits += [f"at most {high:g}"] if high is not None else []
        outside = (low is not None and result < low) or (high is not None and result > high)
        if outside or not math.isfinite(result):
            raise ValueError(f"{where}: must be {' and '.join(limits) or 'finite'}")
    return result


def convert(value: Any, kind: Any, where: str) -> Any:
    """``value`` as a ``kind``: bool, int, float, str, a ``Literal``, a union of those, or a tuple or list of one."""
    origin = get_origin(kind)
    if origin is Literal:
        for choice in get_args(kind):
            if value == choice and isinstance(value, type(choice)):
                return choice
            if isinstance(value, str) and value == str(choice):
                return choice
        raise ValueError(f"{where}: must be one of {', '.join(map(repr, get_args(kind)))}")
    if origin in (Union, types.UnionType):
        return convert_union(value, get_args(kind), where)
    if origin in (tuple, list):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise TypeError(f"{where}: type {type_name(kind)} is needed, got {type(value).__name__}")
        element = get_args(kind)[0] if get_args(kind) else Any
        return origin(convert(item, element, where) for item in items)
    return convert_plain(value, kind, where)


def convert_union(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """``value`` as the first of ``kinds`` that takes it."""
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return convert(value, kind, where)
            except (TypeError, ValueError):
                continue
    raise TypeError(f"{where}: type {' | '.join(map(type_name, kinds))} is needed, got {type(value).__name__}")


def convert_plain(value: Any, kind: Any, where: str) -> Any:
    """``value`` as a bool, an int, a float or a str; any other type must match already."""
    if kind is Any:
        return value
    if isinstance(value, str) and kind in (bool, int, float):
        try:
            if kind is bool:
                if value.lower() not in TRUE | FALSE:
                    raise ValueError
                return value.lower() in TRUE
            return kind(value)
        except ValueError:
            raise TypeError(f"{where}: type {type_name(kind)} is needed, got the text {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and kind in (int, float):
        raise TypeError(f"{where}: type {type_name(kind)} is needed, got bool")
    if isinstance(kind, type) and not isinstance(value, kind):
        raise TypeError(f"{where}: type {type_name(kind)} is needed, got {type(value).__name__}")
    return value


def type_name(kind: Any) -> str:
    """A type as users read it: ``int``, ``'local' | 'global'``, ``float | None``."""
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(map(type_name, get_args(kind)))
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
