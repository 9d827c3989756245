"""Proxies over accuracies: of runs, and of a file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastprune.cli.main import main
from fastprune.report.log import PruningRun
from fastprune.report.proxy_ranking import Ranking, rank_runs, ranks, read_ranking

WriteRun = Callable[..., Path]

NETWORKS = [
    {"proxies": {"sp": 0.4, "slim": 0.7}, "accuracies": [0.8, 0.9]},
    {"proxies": {"sp": 0.2, "slim": 0.8}, "accuracies": [0.9, 1.0]},
    {"proxies": {"sp": 0.3, "slim": 0.9}, "accuracies": 0.875},
]


def searched(write_run: WriteRun, name: str, proxy: float, tuned: float | None, **settings: Any) -> PruningRun:
    records: list[dict[str, Any]] = [{"stage": "plan", "search": {"proxy_loss": proxy}}]
    if tuned is not None:
        records.append({"stage": "result", "method": "finetune", "compact": {"accuracy": tuned}})
    return PruningRun.read(write_run(name, records, **({"method": "sp", "sp": {}, "model": "a"} | settings)))


def test_equal_values_share_a_rank() -> None:
    assert ranks([3, 1, 3, 0, 3]) == [4, 2, 4, 1, 4]


def test_the_correlation_is_that_of_ranks() -> None:
    accuracies = [[0.1], [0.2, 0.4], [0.9]]
    assert Ranking("", "", [1, 10, 1000], accuracies).correlation == pytest.approx(1)
    assert Ranking("", "", [3, 2, 1], accuracies).correlation == pytest.approx(-1)
    assert Ranking("", "", [1, 3, 2], accuracies).correlation == pytest.approx(0.5)
    assert Ranking("", "", [1, 1, 1], accuracies).correlation is None
    assert Ranking("", "", [1, 2, 3], accuracies).means == pytest.approx([0.1, 0.3, 0.9])


def test_runs_that_were_trained_after_their_search(write_run: WriteRun) -> None:
    runs = [searched(write_run, f"sp{n}", n / 10, 0.9 - n / 10) for n in range(3)]
    runs += [searched(write_run, "untuned", 0.5, None), searched(write_run, "other", 0.6, 0.5, model="b")]
    (found,) = rank_runs(runs)
    assert (found.title, found.label) == ("sp", "loss of the proxy")
    assert found.proxies == [0, 0.1, 0.2]
    assert found.accuracies == [[0.9], [0.8], [pytest.approx(0.7)]]
    assert rank_runs(runs[1:]) == []  # two of a model


def test_other_losses_are_other_rankings(write_run: WriteRun) -> None:
    runs = [
        searched(write_run, f"{proxy}{n}", n, 0.9 - n / 10, sp={"proxy": proxy, "adaptor": "trained"})
        for proxy in ("mse", "network")
        for n in range(3)
    ]
    titles = [ranking.title for ranking in rank_runs(runs)]
    assert titles == ["sp, proxy=mse, adaptor=trained", "sp, proxy=network, adaptor=trained"]


def test_stages_and_seeds_of_a_file(tmp_path: Path) -> None:
    """The rows of bench/proxies.py: losses of stages, accuracies by seed, networks that wait for their training."""
    rows = [{"proxies": {"mse": [1, n], "network": [n]}, "accuracies": {"0": 0.9, "1": 0.8 - n / 10}} for n in range(3)]
    path = tmp_path / "proxies.json"
    path.write_text(json.dumps({"networks": [*rows, {"proxies": {"mse": [1, 9]}, "accuracies": {}}]}))
    mse, network = read_ranking(path)
    assert (mse.proxies, network.proxies) == ([1, 2, 3], [0, 1, 2])
    assert mse.accuracies == [[0.9, pytest.approx(0.8 - n / 10)] for n in range(3)]
    path.write_text(json.dumps({"networks": [*rows[:2], *({"proxies": {"mse": [1]}, "accuracies": {}},) * 2]}))
    with pytest.raises(ValueError, match="only 2 networks are trained; 3 are needed"):
        read_ranking(path)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps({"networks": NETWORKS}))
    sp, slim = read_ranking(tmp_path / "new.json")
    assert (sp.label, slim.label) == ("sp", "slim")
    assert sp.proxies == [0.4, 0.2, 0.3]
    assert sp.accuracies == [[0.8, 0.9], [0.9, 1.0], [0.875]]
    assert sp.correlation == pytest.approx(-1)
    flat = [{"widths": [1, 2], "sp_loss": n, "best": True, "from_scratch": [0.5 + n / 10]} for n in range(3)]
    (tmp_path / "flat.json").write_text(json.dumps({"networks": flat}))  # the rows of bench/ranking.py
    (found,) = read_ranking(tmp_path / "flat.json")
    assert (found.label, found.proxies, found.accuracies) == ("sp_loss", [0, 1, 2], [[0.5], [0.6], [0.7]])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "this is no JSON"),
        ({"rows": NETWORKS}, "a list 'networks' of at least 3 networks is needed"),
        ({"networks": NETWORKS[:2]}, "a list 'networks' of at least 3 networks is needed"),
        ({"networks": [*NETWORKS, {"proxies": {"sp": 1}}]}, "network 4: 'accuracies' must be a number or a list"),
        ({"networks": [*NETWORKS, {"sp": 1, "accuracies": ["0.5"]}]}, r"a list of numbers; got \['0.5'\]"),
        ({"networks": [*NETWORKS, {"proxies": 1, "accuracies": 0.5}]}, "network 4: 'proxies' must be {name: number}"),
        ({"networks": [*NETWORKS, {"other": 1, "accuracies": 0.5}]}, "the networks have no proxy in common"),
        ({"networks": [*NETWORKS, 3]}, "network 4: 'accuracies' must be"),
    ],
)
def test_bad_files(document: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        read_ranking(path)
    assert str(error.value).startswith(f"--ranking {path}")


# --- the command ------------------------------------------------------------------------------------------------------


def report(line: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(shlex.split(f"report {line}"))
    return code, *capfd.readouterr()


def test_the_chart_of_a_file_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"networks": NETWORKS}))
    code, out, _ = report(f"--ranking {tmp_path}/r.json --out {tmp_path}/new", capfd)
    assert code == 0
    assert out == f"chart: {tmp_path}/new/proxy_ranking_of_file.png\n"
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {f"proxy_ranking_of_file.{kind}" for kind in ("png", "svg")}
    code, out, _ = report(f"--ranking {tmp_path}/r.json --out {tmp_path}/new --json", capfd)
    assert json.loads(out) == {"figures": ["proxy_ranking_of_file"], "left_out": {}, "report": None}


def test_the_chart_of_a_file_in_a_page(write_run: WriteRun, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"networks": NETWORKS}))
    run = write_run("a", [])
    code, out, _ = report(f"--run {run} --ranking {tmp_path}/r.json --json", capfd)
    assert code == 0
    assert json.loads(out)["figures"] == ["widths", "proxy_ranking_of_file"]
    assert 'id="proxy_ranking_of_file"' in (run / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [("--ranking r.json", "--out is needed"), ("--ranking nowhere.json --out new", "nowhere.json")],
)
def test_bad_input(line: str, message: str, tmp_path: Path, capfd: Any) -> None:
    code, out, err = report(line, capfd)
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("new").exists()
