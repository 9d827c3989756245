"""Remembered descriptions of methods: the same as fresh ones, whatever has happened meanwhile."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastprune.methods import PluginError, catalogue, registry

Install = Callable[..., None]

PLUGIN = """
from dataclasses import dataclass
from fastprune.methods import option
from fastprune.methods.scores.magnitude import L1

@dataclass(frozen=True)
class Config(L1.Config):
    part: float = option({default}, "a part")
    sizes: tuple[int, ...] = option((1,), "some sizes")

class Good(L1):
    "A good one."
    name = "good"
    Config = Config
"""


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setenv("FASTPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "methods"


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods that are imported and described from now on."""
    names: list[str] = []
    info = registry.info

    def count(name: str, points: list) -> registry.MethodInfo:
        names.append(name)
        return info(name, points)

    monkeypatch.setattr(registry, "info", count)
    return names


def forget(name: str) -> None:
    """Let Python import a module anew."""
    sys.modules.pop(name, None)


def rewrite(path: Path, text: str) -> None:
    """Write a source file; its time is another one even where the clock of the file system is slow."""
    path.write_text(text)
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 10**9))


def test_remembered_and_fresh_descriptions_agree(described: list[str], memory: Path) -> None:
    fresh, faults = catalogue.survey()
    assert described == sorted(fresh)
    assert (fresh, faults) == (registry.available(), {})
    described.clear()
    assert catalogue.survey() == (fresh, {})
    assert catalogue.find("dmc") == fresh["dmc"]
    assert described == []
    assert len(list(memory.iterdir())) == 1


def test_an_edited_plugin_is_described_again(distribution: Install, described: list[str], tmp_path: Path) -> None:
    distribution("nice-plugin", {"good": "plugin_good:Good"}, {"plugin_good": PLUGIN.format(default=0.5)})
    assert [option.default for option in catalogue.find("good").options[-2:]] == [0.5, (1,)]
    assert [option.default for option in catalogue.find("good").options[-2:]] == [0.5, (1,)]
    assert described == ["good"]
    rewrite(tmp_path / "nice-plugin" / "plugin_good.py", PLUGIN.format(default=0.25))
    forget("plugin_good")
    assert catalogue.find("good").options[-2].default == 0.25
    assert described == ["good", "good"]


def test_a_plugin_that_is_gone_is_forgotten(distribution: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution("nice-plugin", {"good": "plugin_good:Good"}, {"plugin_good": PLUGIN.format(default=0.5)})
    assert "good" in catalogue.survey()[0]
    monkeypatch.undo()  # uninstalls it, and the cache folder of this test
    assert "good" not in catalogue.survey()[0]
    with pytest.raises(ValueError, match="no pruning method is called 'good'"):
        catalogue.find("good")


def test_broken_plugins_are_reported_on_every_call(distribution: Install) -> None:
    distribution("bad-plugin", {"bad": "plugin_bad:Bad"}, {"plugin_bad": "import does_not_exist_anywhere"})
    for _ in range(2):
        usable, faults = catalogue.survey()
        assert "bad" not in usable
        assert "cannot be imported: ModuleNotFoundError" in faults["bad"]
        with pytest.raises(PluginError, match="'bad' of package 'bad-plugin'"):
            catalogue.find("bad")


def test_a_plugin_that_breaks_is_reported(distribution: Install, tmp_path: Path) -> None:
    distribution("nice-plugin", {"good": "plugin_good:Good"}, {"plugin_good": PLUGIN.format(default=0.5)})
    assert "good" in catalogue.survey()[0]
    (tmp_path / "nice-plugin" / "plugin_good.py").unlink()
    forget("plugin_good")
    assert "ModuleNotFoundError" in catalogue.survey()[1]["good"]


def test_two_plugins_of_one_name_are_reported(distribution: Install) -> None:
    distribution("first-plugin", {"good": "plugin_good:Good"}, {"plugin_good": PLUGIN.format(default=0.5)})
    assert "good" in catalogue.survey()[0]
    distribution("second-plugin", {"good": "plugin_other:Good"}, {"plugin_other": PLUGIN.format(default=0.5)})
    usable, faults = catalogue.survey()
    assert "good" not in usable
    assert "offered by" in faults["good"]


def test_a_new_package_is_a_reason_to_look_again(
    described: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    catalogue.find("l1")
    (folder / "something").mkdir()
    os.utime(folder, ns=(0, folder.stat().st_mtime_ns + 10**9))
    catalogue.find("l1")
    assert described == ["l1", "l1"]


def test_a_default_that_is_no_plain_value_is_never_remembered(distribution: Install, described: list[str]) -> None:
    code = PLUGIN.format(default="float('inf')")
    distribution("nice-plugin", {"good": "plugin_good:Good"}, {"plugin_good": code})
    for _ in range(2):
        assert catalogue.find("good").options[-2].default == float("inf")
    assert described == ["good", "good"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"l1": 3}', '{"l1": {"key": "KEY"}}', '{"l1": {"key": "KEY", "info": {}}}']
)
def test_a_spoilt_file_is_ignored(text: str, memory: Path, described: list[str]) -> None:
    expected = catalogue.find("l1")
    (file,) = memory.iterdir()
    key = json.loads(file.read_text())["l1"]["key"]
    file.write_text(text.replace("KEY", key))
    assert catalogue.find("l1") == expected
    assert catalogue.find("l1") == expected
    assert described == ["l1", "l1"]


def test_without_a_place_to_write(memory: Path, described: list[str]) -> None:
    memory.parent.write_text("a file where the folder should be")
    for _ in range(2):
        assert catalogue.find("l1").name == "l1"
    assert described == ["l1", "l1"]
