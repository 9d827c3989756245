"""Pickles of plain values and NumPy arrays, read as data: nothing in them is imported or called.

CIFAR is published as such files. ``pickle`` is a machine whose programs may call any function. This reader has a few
operations of that machine: they put numbers, texts, lists, dicts and bytes together. The two functions that arrays are
pickled with are known by name, and stand for an array of bytes. Any other name or operation is refused (decision 075).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARRAY = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
TYPES = {("numpy", "dtype"), ("numpy", "ndarray")}
BYTES = {("_codecs", "encode")}  # how protocol 2 writes Python 3's bytes

VALUES = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
TEXTS = {"STRING", "SHORT_BINSTRING", "BINSTRING"}  # Python 2's, which are bytes
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NOTHING = {"PROTO", "FRAME", "STOP"}

_MARK = object()


class Name(tuple[str, str]):
    """The name of a function or class; it is never looked up."""


class Parts:
    """What a function would have been called with, and the state that follows."""

    def __init__(self, name: Name, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain values and arrays of bytes.

    Args:
        path: the file.

    Returns:
        Its value; texts of Python 2 are bytes, arrays are uint8.

    Raises:
        ValueError: if the file is missing or cut off, or holds anything else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r}: there is no such file") from error
    machine = Machine()
    try:
        for operation, argument, _ in pickletools.genops(content):
            machine.run(operation.name, argument)
        return unwrap(machine.stack[-1])
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: not a pickle of plain values and arrays ({error})") from error
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r}: a damaged pickle ({type(error).__name__}: {error})") from error


class Machine:
    """The operations, on a stack and a memory."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Run one operation.

        Raises:
            ValueError: for one that this machine does not have.
        """
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in TEXTS:
            stack.append(argument if isinstance(argument, bytes) else argument.encode("latin-1"))
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in TUPLES:
            count = TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name not in NOTHING:
            method: Callable[[Any], None] | None = getattr(self, f"do_{name.lower()}", None)
            if method is None:
                raise ValueError(f"the operation {name} is not allowed")
            method(argument)

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the last mark from the stack."""
        place = len(self.stack) - 1 - next(i for i, value in enumerate(reversed(self.stack)) if value is _MARK)
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def do_mark(self, _: Any) -> None:
        """Put a mark on the stack."""
        self.stack.append(_MARK)

    def do_tuple(self, _: Any) -> None:
        """Make a tuple of everything above the mark."""
        self.stack.append(tuple(self.pop_to_mark()))

    def do_append(self, _: Any) -> None:
        """Append a value to a list."""
        value = self.stack.pop()
        self.stack[-1].append(value)

    def do_appends(self, _: Any) -> None:
        """Append everything above the mark to a list."""
        values = self.pop_to_mark()
        self.stack[-1].extend(values)

    def do_setitem(self, _: Any) -> None:
        """Set an item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][key] = value

    def do_setitems(self, _: Any) -> None:
        """Set the items above the mark in a dict."""
        values = self.pop_to_mark()
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def do_binput(self, place: int) -> None:
        """Remember the top of the stack."""
        self.memory[place] = self.stack[-1]

    do_long_binput = do_put = do_binput

    def do_memoize(self, _: Any) -> None:
        """Remember the top of the stack in the next place."""
        self.memory[len(self.memory)] = self.stack[-1]

    def do_binget(self, place: int) -> None:
        """Recall a value."""
        self.stack.append(self.memory[place])

    do_long_binget = do_get = do_binget

    def do_global(self, argument: str) -> None:
        """Put a known name on the stack."""
        module, _, name = argument.partition(" ")
        self.push_name(module, name)

    def do_stack_global(self, _: Any) -> None:
        """Put a known name on the stack, whose parts lie there."""
        name, module = self.stack.pop(), self.stack.pop()
        self.push_name(module, name)

    def push_name(self, module: str, name: str) -> None:
        """Put a name on the stack if it is one of those that arrays are pickled with."""
        if (module, name) not in ARRAY | TYPES | BYTES:
            raise ValueError(f"the name {module}.{name} is not allowed")
        self.stack.append(Name((module, name)))

    def do_reduce(self, _: Any) -> None:
        """Put the parts of a call on the stack."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of something without a name")
        if name in BYTES:
            self.stack.append(arguments[0].encode("latin-1"))
        else:
            self.stack.append(Parts(name, arguments))

    def do_build(self, _: Any) -> None:
        """Give parts their state."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Parts):
            raise ValueError("a state for something that is no array")
        self.stack[-1].state = state


def unwrap(value: Any) -> Any:
    """Return a value with arrays in place of their parts."""
    if isinstance(value, Parts):
        return make_array(value)
    if isinstance(value, dict):
        return {unwrap(key): unwrap(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, Name):
        return type(value)(map(unwrap, value))
    if isinstance(value, Name) or value is _MARK:
        raise ValueError("a name in place of a value")
    return value


def make_array(parts: Parts) -> NDArray[np.uint8]:
    """Return the array that the parts describe.

    Raises:
        ValueError: if it is no array of bytes, or does not fill its shape.
    """
    if parts.name not in ARRAY or not isinstance(parts.state, tuple) or len(parts.state) != 5:
        raise ValueError("something that is no array")
    _, shape, kind, column_major, content = parts.state
    if not isinstance(kind, Parts) or kind.arguments[0] not in ("u1", b"u1") or not isinstance(content, bytes):
        raise ValueError("an array that is not of bytes")
    flat = np.frombuffer(bytearray(content), dtype=np.uint8)
    array: NDArray[np.uint8] = flat.reshape(shape, order="F" if column_major else "C")
    return array
