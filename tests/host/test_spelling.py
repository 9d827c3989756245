"""Suggestions for mistyped names."""

from __future__ import annotations

import pytest

from fastprune.host.spelling import did_you_mean

KNOWN = ["epochs", "seed", "seeds"]


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("epohcs", {}, "did you mean 'epochs'?"),
        ("epohcs", {"form": "; {}"}, "; did you mean 'epochs'?"),
        ("epohcs", {"show": "--{}".format}, "did you mean --epochs?"),
        ("seedss", {"most": 2}, "did you mean 'seeds' or 'seed'?"),
        ("width", {"form": " ({})"}, ""),
        (7, {}, ""),
    ],
)
def test_did_you_mean(name: object, options: dict[str, object], text: str) -> None:
    assert did_you_mean(name, KNOWN, **options) == text  # type: ignore[arg-type]
