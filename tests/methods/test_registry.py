from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import pytest

from fastprune.methods import Method, PluginError, PluginWarning, available, broken, configure, load, option, registry
from fastprune.methods.gates.dmc import DMC, DMCConfig
from fastprune.methods.scores.magnitude import L1, Uniform

GOOD = """
from fastprune.methods import ScoreMethod
from fastprune.methods.scores.magnitude import L1

class Good(L1):
    "A good one,\\n    on two lines.\\n\\nMore."
    name = "good"
"""


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_warned", set())


def test_built_in_methods_come_through_the_entry_points():
    methods = available()
    assert {"dmc", "l1", "l2", "random", "uniform"} <= methods.keys()
    assert list(methods) == sorted(methods)
    dmc = methods["dmc"]
    assert (dmc.package, dmc.needs_data) == ("fastprune", True)
    assert "CVPR 2020" in dmc.paper
    assert dmc.summary.startswith("Learn which channels to keep")
    options = {o.name: o for o in dmc.options}
    assert options["epochs"].type == "int"
    assert options["epochs"].default == 300
    assert options["groups"].type == "'auto' | 'interior' | 'one_gate' | 'all'"
    assert all(o.help for info in methods.values() for o in info.options)
    assert load("dmc") is DMC
    assert load("l1") is L1


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(ValueError, match=r"no pruning method is called 'l11': did you mean .*'l1'"):
        load("l11")
    with pytest.raises(ValueError, match=r"'zzz': there are .*dmc"):
        load("zzz")


def test_an_empty_registry_says_how_to_install(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    with pytest.raises(ValueError, match="install fastprune as a package"):
        load("dmc")


def test_third_party_method_is_found(distribution):
    distribution("nice-plugin", {"good": "plugin_good:Good"}, {"plugin_good": GOOD})
    info = available()["good"]
    assert (info.package, info.version, info.summary) == ("nice-plugin", "1.0", "A good one, on two lines.")
    assert load("good").name == "good"


BROKEN = {
    "import error": ("import does_not_exist_anywhere", "cannot be imported: ModuleNotFoundError"),
    "exits": ("raise SystemExit(3)", "cannot be imported: SystemExit"),
    "no such class": ("", "cannot be imported: AttributeError"),
    "no class": ("Bad = 3", "is no class"),
    "no method": ("class Bad: name = 'bad'", "is no subclass of fastprune.methods.Method"),
    "abstract": ("from fastprune.methods import Method\nclass Bad(Method): name = 'bad'", "does not implement plan"),
    "other name": (f"{GOOD}\nBad = Good", "calls itself 'good', but its entry point says 'bad'"),
    "no name": (
        "from fastprune.methods import ScoreMethod\nclass Bad(ScoreMethod):\n    def scores(self, task): ...",
        "has no name",
    ),
    "no dataclass": (f"{GOOD}\nclass Bad(Good):\n    name = 'bad'\n    Config = dict", "Config is not a dataclass"),
    "no default": (
        f"{GOOD}\nfrom dataclasses import dataclass\n@dataclass\nclass C:\n    a: int\n"
        "class Bad(Good):\n    name = 'bad'\n    Config = C",
        "Config has no usable defaults",
    ),
    "paper": (f"{GOOD}\nclass Bad(Good):\n    name = 'bad'\n    paper = 2020", "not a text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_is_reported_and_breaks_nothing_else(distribution, case):
    code, reason = BROKEN[case]
    distribution("bad-plugin", {"bad": "plugin_bad:Bad"}, {"plugin_bad": code})
    with pytest.warns(PluginWarning, match="'bad' of package 'bad-plugin'"):
        methods = available()
    assert "bad" not in methods
    assert {"dmc", "l1"} <= methods.keys()
    assert reason in broken()["bad"]
    with pytest.raises(PluginError, match="'bad' of package 'bad-plugin'") as caught:
        load("bad")
    assert reason in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        available()  # the warning comes once
        assert load("l1") is L1


def test_two_plugins_of_one_name_name_both_packages(distribution):
    distribution("first-plugin", {"good": "plugin_good:Good"}, {"plugin_good": GOOD})
    distribution("second-plugin", {"good": "plugin_other:Good"}, {"plugin_other": GOOD})
    with pytest.raises(PluginError, match=r"(?s)'good' is offered by .*first-plugin.*uninstall") as caught:
        load("good")
    assert "second-plugin" in str(caught.value)
    with pytest.warns(PluginWarning):
        methods = available()
    assert "good" not in methods
    assert {"dmc", "uniform"} <= methods.keys()
    assert "first-plugin" in broken()["good"]


def test_a_third_party_cannot_silently_replace_a_built_in_method(distribution):
    distribution("shadow", {"l1": "plugin_good:Good"}, {"plugin_good": GOOD})
    with pytest.raises(PluginError, match="fastprune"):
        load("l1")


@dataclass(frozen=True)
class Options:
    count: int = option(3, "a number", minimum=1, maximum=9)
    part: float = option(0.5, "a part")
    flag: bool = option(False, "a switch")
    kind: Literal["a", "b"] = option("a", "a choice")
    limit: float | None = option(None, "a number or nothing")
    widths: tuple[int, ...] = option((), "some numbers")

    def __post_init__(self) -> None:
        if self.part > 0.9:
            raise ValueError(f"part {self.part}: too much")


class Optioned(Uniform):
    name = "optioned"
    Config = Options


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Options()),
        ({"count": 4, "part": 1 / 4}, Options(count=4, part=0.25)),
        ({"part": 0}, Options(part=0.0)),
        ({"count": "4", "part": "1e-4", "flag": "true"}, Options(count=4, part=1e-4, flag=True)),
        ({"flag": "off", "kind": "b"}, Options(kind="b")),
        ({"limit": "none"}, Options()),
        ({"limit": 2}, Options(limit=2.0)),
        ({"widths": [1, 2]}, Options(widths=(1, 2))),
        ({"widths": "1,2"}, Options(widths=(1, 2))),
    ],
)
def test_configure_reads_values_and_text(given, expected):
    assert configure(Optioned, given) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"counts": 4}, ValueError, r"has no option 'counts' \(did you mean 'count'\?\); its options: count, part"),
        ({"count": 0}, ValueError, "count 0: must be at least 1 and at most 9"),
        ({"count": "10"}, ValueError, "must be at least 1 and at most 9"),
        ({"count": 1.5}, TypeError, "count 1.5: type int is needed, got float"),
        ({"count": True}, TypeError, "type int is needed, got bool"),
        ({"count": "many"}, TypeError, "got the text 'many'"),
        ({"part": float("nan")}, ValueError, "must be finite"),
        ({"part": 0.95}, ValueError, "method 'optioned': part 0.95: too much"),
        ({"flag": 1}, TypeError, "type bool is needed"),
        ({"flag": "perhaps"}, TypeError, "got the text 'perhaps'"),
        ({"kind": "c"}, ValueError, "must be one of 'a', 'b'"),
        ({"limit": "x"}, TypeError, r"type float \| None is needed, got str"),
        ({"widths": 3}, TypeError, "is needed, got int"),
    ],
)
def test_configure_refuses_wrong_values(given, error, message):
    with pytest.raises(error, match=message):
        configure(Optioned, given)


def test_configure_of_a_built_in():
    assert configure(DMC, {"epochs": 3, "regularisation": 8}) == DMCConfig(epochs=3, regularisation=8.0)
    with pytest.raises(ValueError, match="epochs 0: must be at least 1"):
        configure(DMC, {"epochs": 0})
    assert issubclass(DMC, Method)
