"""Numbers and tables as people read them."""

from __future__ import annotations

import doctest

from fastprune.host import wording


def test_examples() -> None:
    tried = doctest.testmod(wording)
    assert tried.attempted >= 7
    assert tried.failed == 0


def test_cards_wrap_and_align() -> None:
    text = wording.card("title", [("a", "word " * 30), ("long", "x")])
    lines = text.splitlines()
    assert lines[0] == "title"
    assert lines[1].startswith("  a     word")
    assert lines[2].startswith("        word")
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "  long  x"


def test_tables_cut_nothing() -> None:
    name = "a.very.long.name" * 10
    table = wording.text_table(["layer", "n"], [[name, "1"], ["b", "22"]])
    assert table.splitlines() == [
        "layer".ljust(160) + "   n", "-" * 160 + "  --", name + "   1", "b".ljust(160) + "  22",
    ]  # fmt: skip


def test_html_is_escaped() -> None:
    assert "<b>x" not in wording.html_card("t", [("<b>x", "&")]).replace("<b>t</b>", "")
