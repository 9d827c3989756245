"""Suggestions for names that a user has mistyped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches


def did_you_mean(
    name: object, known: Iterable[str], form: str = "{}", *, most: int = 1, show: Callable[[str], str] = repr
) -> str:
    """Return the question that suggests known names near to a mistyped one.

    Args:
        name: what the user wrote.
        known: the names that exist.
        form: the text around the question, in the place of ``{}``.
        most: how many names to suggest at most.
        show: how a name is written.

    Returns:
        The question; "" if no known name is near.

    Example:
        >>> did_you_mean("epohcs", ["epochs", "seed"])
        "did you mean 'epochs'?"
    """
    near = get_close_matches(str(name), list(known), n=most)
    return form.format(f"did you mean {' or '.join(map(show, near))}?") if near else ""
