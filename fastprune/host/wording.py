"""Numbers and facts as people read them: counts, changes, and short cards of facts in text and HTML.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from textwrap import fill

Facts = Sequence[tuple[str, str]]
"""(what, text) pairs, one line each."""

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def count(value: float) -> str:
    """Return a count with three digits and a unit.

    >>> count(40_551_040), count(4_089_184_256), count(999), count(999_950)
    ('40.6 M', '4.09 G', '999', '1.00 M')
    """
    for size, unit in UNITS:
        if value >= size * 0.9995:
            scaled = value / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f} {unit}"
    return f"{value:,.0f}"


def percent(value: float, digits: int = 1) -> str:
    """Return a fraction as a percentage.

    >>> percent(0.4987)
    '49.9 %'
    """
    return f"{100 * value:.{digits}f} %"


def change(full: float, planned: float) -> str:
    """Return two sizes, and the second as a percentage of the first.

    >>> change(40_551_040, 20_225_092)
    '40.6 M → 20.2 M (49.9 %)'
    """
    part = f" ({percent(planned / full)})" if full else ""
    return f"{count(full)} → {count(planned)}{part}"


def milliseconds(value: float) -> str:
    """Return a time in milliseconds with three digits.

    >>> milliseconds(1.2345), milliseconds(123.4)
    ('1.23 ms', '123 ms')
    """
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f} ms"


def speed(full: float, planned: float) -> str:
    """Return how much faster a network is, by its times.

    >>> speed(3.0, 1.5), speed(1.0, 1.25)
    ('2.00× faster', '1.25× slower')
    """
    return f"{full / planned:.2f}× faster" if planned <= full else f"{planned / full:.2f}× slower"


def speed_change(full: float, planned: float) -> str:
    """Return two times in milliseconds, and how much faster the second is."""
    return f"{milliseconds(full)} → {milliseconds(planned)} ({speed(full, planned)})"


def points(difference: float) -> str:
    """Return a difference of two fractions in percentage points, with its sign.

    >>> points(-0.003), points(0.013), points(-0.00001)
    ('−0.3 points', '+1.3 points', '0.0 points')
    """
    rounded = round(100 * difference, 1)
    sign = "−" if rounded < 0 else "+" if rounded > 0 else ""
    return f"{sign}{abs(rounded):.1f} points"


def duration(seconds: float) -> str:
    """Return a duration in the units that people would use.

    >>> duration(3.21), duration(75), duration(7300)
    ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def narrowest(widths: Mapping[str, tuple[int, int]], most: int = 3) -> str:
    """Return the groups that lose the largest part of their units.

    >>> narrowest({"a": (8, 8), "b": (2, 16), "c": (4, 8)})
    'b: 2 of 16, c: 4 of 8'
    """
    cut = {name: pair for name, pair in widths.items() if pair[0] < pair[1]}
    chosen = sorted(cut, key=lambda name: cut[name][0] / cut[name][1])[:most]
    return ", ".join(f"{name}: {cut[name][0]} of {cut[name][1]}" for name in chosen) or "no group is pruned"


def card(title: str, facts: Facts) -> str:
    """Return a title and one line for each fact, aligned."""
    wide = max((len(what) for what, _ in facts), default=0)
    lines = (fill(text, 76 - wide, break_long_words=False, break_on_hyphens=False) for _, text in facts)
    indented = (text.replace("\n", "\n" + " " * (wide + 4)) for text in lines)
    return "\n".join([title, *(f"  {what:{wide}}  {text}" for (what, _), text in zip(facts, indented, strict=True))])


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a table in columns as wide as their longest text, so that nothing is cut.

    Args:
        headings: one for each column.
        rows: the texts.
        left: number of columns whose texts begin at the left; those after them end at the right.
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = []
    for row in (headings, ["-" * width for width in widths], *rows):
        cells = (
            text.ljust(w) if n < left else text.rjust(w) for n, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def html_card(title: str, facts: Facts) -> str:
    """Return a title and a table of facts, for notebooks."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(what)}</th><td style="text-align:left">{escape(text)}</td></tr>'
        for what, text in facts
    )
    return f"<table><caption style='text-align:left'><b>{escape(title)}</b></caption><tbody>{rows}</tbody></table>"


def fill_command(words: Sequence[str], width: int = 96) -> str:
    r"""Return a command over as many lines as it needs, for a shell; an option stays with its first value.

    >>> print(fill_command(["fastprune", "prune", "--model", "resnet20", "--out", "runs/a"], width=30))
    fastprune prune \
        --model resnet20 \
        --out runs/a
    """
    parts: list[str] = []
    for word in words:
        if word.startswith("--") or not parts:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > width:
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)
