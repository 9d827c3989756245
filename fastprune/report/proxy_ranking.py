"""The order that a search's proxy gives networks, beside their accuracies after training. After Fig. 4 of SP."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.report.log import PruningRun, number
from fastprune.report.outcome import outcome_of

LEAST = 3
"""Networks that make a panel."""

PROXIES = {
    "proxy_loss": "loss of the proxy",
    "distillation_loss": "distillation loss",  # the same in runs of earlier versions, whose proxy was that
    "sub_network_accuracy": "accuracy with shared weights",
    "proxy_accuracy": "held-out accuracy before fine-tuning",
}
"""{metric at the end of a search: its words}."""

KINDS = ("proxy", "adaptor", "relative")
"""Options of searches whose proxies have other units."""

ACCURACIES = ("accuracies", "from_scratch")
"""Names of a network's accuracies in a file."""


@dataclass(frozen=True)
class Ranking:
    """One proxy of several networks, and their accuracies.

    Args:
        title: the method whose proxy it is; "" if the label says it.
        label: what the proxy is.
        proxies: its value for each network.
        accuracies: the accuracies of each network after training, one or one per seed.
    """

    title: str
    label: str
    proxies: list[float]
    accuracies: list[list[float]]

    @property
    def means(self) -> list[float]:
        """The mean accuracy of each network."""
        return [statistics.fmean(own) for own in self.accuracies]

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation of proxy and mean accuracy; None if all values of one of them are equal."""
        try:
            return statistics.correlation(ranks(self.proxies), ranks(self.means))
        except statistics.StatisticsError:
            return None


def ranks(values: Sequence[float]) -> list[float]:
    """Return the ranks of values from 1; equal values share the mean of theirs.

    >>> ranks([0.5, 0.1, 0.5])
    [2.5, 1.0, 2.5]
    """
    return [(sum(v < own for v in values) + sum(v <= own for v in values) + 1) / 2 for own in values]


def rank_runs(runs: Sequence[PruningRun]) -> list[Ranking]:
    """Return the proxy of each method, and model, of which at least three runs were trained after their search."""
    found: dict[tuple[str, ...], Ranking] = {}  # networks of other models, and other losses, do not compare
    for run in runs:
        tuned = outcome_of(run).tuned
        for metric, words in PROXIES.items():
            proxy = number(run.last("plan"), "search", metric)
            if proxy is not None and tuned is not None:
                loss = [f"{name}={run.options[name]}" for name in KINDS if name in run.options]
                key = (run.method, metric, str(run.config.get("model")), *loss)
                own = found.setdefault(key, Ranking(", ".join([run.method, *loss]), words, [], []))
                own.proxies.append(proxy)
                own.accuracies.append([tuned])
    return [ranking for ranking in found.values() if len(ranking.proxies) >= LEAST]


def read_ranking(path: str | Path) -> list[Ranking]:
    """Read proxies and accuracies of networks from a JSON file.

    The file has ``networks``, a list. A network has ``accuracies`` (or ``from_scratch``): a number, a list over seeds,
    or {seed: number}; networks that are not trained yet, with none, are left out. It has ``proxies``, {name: value},
    where a list of values over stages counts as their sum; without ``proxies`` its other plain numbers are the proxies.

    Raises:
        ValueError: for a file that is no such JSON, or has fewer than three networks.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--ranking {path}: this is no JSON ({error})") from error
    rows = document.get("networks") if isinstance(document, Mapping) else None
    if not isinstance(rows, list) or len(rows) < LEAST:
        raise ValueError(f"--ranking {path}: a list 'networks' of at least {LEAST} networks is needed")
    all_rows = (_read_row(row, f"--ranking {path}: network {place}") for place, row in enumerate(rows, start=1))
    read = [(proxies, own) for proxies, own in all_rows if own]
    if len(read) < LEAST:
        raise ValueError(f"--ranking {path}: only {len(read)} networks are trained; {LEAST} are needed")
    common = [name for name in read[0][0] if all(name in proxies for proxies, _ in read)]
    if not common:
        raise ValueError(f"--ranking {path}: the networks have no proxy in common")
    return [Ranking("", name, [proxies[name] for proxies, _ in read], [own for _, own in read]) for name in common]


def _read_row(row: Any, where: str) -> tuple[dict[str, float], list[float]]:
    values: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    key = next((name for name in ACCURACIES if name in values), "")
    found = values.get(key)
    given: list[Any] = (
        list(found.values()) if isinstance(found, Mapping) else found if isinstance(found, list) else [found]
    )
    if not all(map(_is_number, given)):
        raise ValueError(f"{where}: 'accuracies' must be a number or a list of numbers; got {found!r}")
    named = values.get("proxies", {name: value for name, value in values.items() if name != key})
    if not isinstance(named, Mapping):
        raise ValueError(f"{where}: 'proxies' must be {{name: number}}; got {named!r}")
    if "proxies" in values:
        named = {name: sum(value) if _is_numbers(value) else value for name, value in named.items()}
    proxies = {str(name): float(value) for name, value in named.items() if _is_number(value)}
    return proxies, [float(value) for value in given]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
