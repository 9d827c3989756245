"""Options: fields of a dataclass that users can set, declared once and checked wherever the values come from.

They become flags of the command line, keys of YAML files and keyword arguments.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastprune.host.spelling import did_you_mean

T = TypeVar("T")

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}

SWITCH: Mapping[str, Any] = types.MappingProxyType({"action": "store_true"})
"""The flag of a bool that is written without a value: ``--json``."""

SEVERAL: Mapping[str, Any] = types.MappingProxyType({"nargs": "+"})
"""The flag of a tuple whose values follow one another: ``--ignore stem head``."""

POSITIONAL: Mapping[str, Any] = types.MappingProxyType({"nargs": "?"})
"""The flag of a value that is written without a name: ``fastprune methods dmc``."""

POSITIONALS: Mapping[str, Any] = types.MappingProxyType({"nargs": "*"})
"""The flag of a tuple whose values are written without a name: ``fastprune compare runs/a runs/b``."""

LARGEST_SEED = 2**63 - 1  # what torch's generators take


def option(
    default: T,
    help: str,  # noqa: A002
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[str] | None = None,
    flag: Mapping[str, Any] | None = None,
) -> T:
    """Declare a field of a dataclass as an option, with its meaning and its allowed values.

    Limits and choices hold for each element of a tuple, and not for None.

    Args:
        default: the value that holds if the user gives none.
        help: one line for ``--help`` and the documentation.
        minimum: the smallest allowed number; None = no limit.
        maximum: the largest allowed number.
        above: a number that the value must exceed.
        below: a number that the value must stay below.
        choices: the allowed texts; None = any. (A ``Literal`` type names its choices itself.)
        flag: the arguments of ``ArgumentParser.add_argument``, for a flag that is not ``--name VALUE``.

    Returns:
        A dataclass field. (Typed as the default, as ``dataclasses.field`` is.)

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     epochs: int = option(10, "passes over the samples", minimum=1)
        >>> Config().epochs
        10
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "choices": None if choices is None else tuple(choices),
        "flag": flag or {},
    }
    field: T = dataclasses.field(default=default, metadata=metadata)
    return field


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """One option, for a command line or a page of documentation.

    Args:
        name: the field's name.
        type: the field's type as text; the choices if it has some.
        default: the value that holds if the user gives none.
        help: what it means.
    """

    name: str
    type: str
    default: Any
    help: str


def describe(config_class: type[Any]) -> tuple[OptionInfo, ...]:
    """Return the options of a dataclass, in the order of its fields."""
    types_of_fields = types_of(config_class)
    defaults = config_class()
    return tuple(
        OptionInfo(f.name, type_name(types_of_fields[f.name]), getattr(defaults, f.name), help_of(f))
        for f in fields_of(config_class)
    )


def fields_of(config_class: type[Any]) -> list[dataclasses.Field[Any]]:
    """Return the fields that a user can set."""
    return [f for f in dataclasses.fields(config_class) if f.init]


def types_of(config_class: type[Any]) -> dict[str, Any]:
    """Return the type of each option by name; a text with choices is a ``Literal``."""
    hints = get_type_hints(config_class)
    choices = {f.name: f.metadata.get("choices") for f in fields_of(config_class) if hints[f.name] is str}
    return {**hints, **{name: Literal[names] for name, names in choices.items() if names}}


def help_of(field: dataclasses.Field[Any]) -> str:
    """Return what an option means."""
    return str(field.metadata.get("help", ""))


def build(config_class: type[T], options: Mapping[str, Any], *, owner: str = "") -> T:
    """Make an instance of a dataclass from options; the others keep their defaults.

    Text is read as the field's type (command lines, and YAML's ``1e-4``, give text where a number is meant).

    Args:
        config_class: the dataclass.
        options: {field: value}.
        owner: whose options they are, for messages.

    Raises:
        ValueError: for an unknown option, or a value that is out of range or not finite.
        TypeError: for a value of another type.
    """
    known = {f.name: f for f in fields_of(config_class)}
    kinds = types_of(config_class)
    prefix = f"{owner}: " if owner else ""
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(name, known, " ({})")
            raise ValueError(f"{owner} has no option {name!r}{hint}; its options: {', '.join(known) or 'none'}")
        values[name] = convert(value, kinds[name], f"{prefix}{name} {value!r}")
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            raise ValueError(f"{prefix}{name} {value!r}: must be finite")
        check_value(f"{prefix}{name}", values[name], known[name].metadata)
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{prefix}{error}") from error


def settle(config: T, values: Mapping[str, Any]) -> T:
    """Return a config with values for those of its options that are None or "auto"."""
    left_open = {name: value for name, value in values.items() if getattr(config, name) in (None, "auto")}
    return dataclasses.replace(config, **left_open)  # type: ignore[type-var]


def check(config: Any) -> None:
    """Check the values of a dataclass against the limits and choices of its options; call it in ``__post_init__``.

    Raises:
        ValueError: for the first value that is not allowed.
    """
    for f in fields_of(type(config)):
        check_value(f.name, getattr(config, f.name), f.metadata)


def check_value(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Check one value against the limits and choices in its field's metadata."""
    choices = metadata.get("choices")
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, str) and choices is not None and item not in choices:
            raise ValueError(f"{name} {item!r}: must be one of {', '.join(map(repr, choices))}")
        if isinstance(item, (int, float)) and not isinstance(item, bool) and not is_within(item, metadata):
            raise ValueError(f"{name} {item!r}: must be {range_text(metadata)}")


def is_within(number: float, metadata: Mapping[str, Any]) -> bool:
    """Return whether a number keeps to the limits in a field's metadata; nan keeps to none."""
    minimum, maximum, above, below = (metadata.get(name) for name in ("minimum", "maximum", "above", "below"))
    return (
        (minimum is None or number >= minimum)
        and (maximum is None or number <= maximum)
        and (above is None or number > above)
        and (below is None or number < below)
    )


def range_text(metadata: Mapping[str, Any]) -> str:
    """Return the limits of a number in words."""
    words = {"minimum": "at least", "maximum": "at most", "above": "above", "below": "below"}
    limits = {text: metadata[name] for name, text in words.items() if metadata.get(name) is not None}
    # A seed's limit has more digits than the format g shows.
    shown = [f"{text} {limit:g}" if isinstance(limit, float) else f"{text} {limit}" for text, limit in limits.items()]
    return " and ".join(shown)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Return ``value`` as a ``kind``: bool, int, float, str, a ``Literal``, a union, or a tuple or list of one kind.

    Args:
        value: the value, or its text.
        kind: the type.
        where: the option and its value, for messages.

    Raises:
        ValueError: for a value that is not among the choices of a ``Literal``.
        TypeError: for a value of another type.
    """
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
    """Return ``value`` as the first of ``kinds`` that takes it."""
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
    """Return ``value`` as a bool, an int, a float or a str; a value of any other type must have that type already."""
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
    """Return a type as users read it: ``int``, ``'local' | 'global'``, ``float | None``."""
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(map(type_name, get_args(kind)))
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
