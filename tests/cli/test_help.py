"""Help that fits a screen, and completions of shells."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastprune.cli.arguments import Invocation, list_options
from fastprune.cli.commands import COMMANDS
from fastprune.cli.main import main
from fastprune.methods import catalogue


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("method", ["dmc", "ddnp", "sp", "autoslim", "gcp", "sanp", "l1", "slimming", "soft", "dp"])
def test_help_of_prune_fits_a_screen(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--method", method, "--help"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    assert lines[2] == "examples:"
    # Each option is there, those of other methods are not, and there are no types.
    for name in set(list_options(Invocation("prune", method))) - {"help", "print_config", method}:
        assert f"--{name}" in shown
    for other in catalogue.survey()[0]:
        assert other == method or f"--{other}." not in shown
    assert "type:" not in shown
    assert "Literal" not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_all_options_are_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for settings in COMMANDS[command].load_settings():
        for f in settings.__dataclass_fields__.values():
            assert " ".join(f.metadata["help"].split()) in shown
    assert main([*command.split(), "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 60


def complete(line: str) -> set[str]:
    """Return what a shell is offered."""
    script = "import sys; sys.argv = ['fastprune']; from fastprune.cli.start import main; main()"
    question = {"COMP_TYPE": "9", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment, **question},
        capture_output=True,
        text=True,
        check=True,
    )
    return {word.strip() for word in done.stdout.split("\n")} - {""}


@pytest.mark.slow
def test_completions() -> None:
    pytest.importorskip("argcomplete")
    assert complete("fastprune pr") == {"prune"}
    assert complete("fastprune prune --dmc.e") == {"--dmc.epochs", "--dmc.evaluate_every"}
    assert complete("fastprune prune --method l1 --l1.") == {"--l1.groups", "--l1.ranking"}
    assert complete("fastprune prune --method l") == {"l1", "l2", "lamp"}
    assert "dmc-resnet56-cifar10" in complete("fastprune prune --recipe dmc-resnet5")
    assert complete("fastprune recipes show sp-resnet56") == {"sp-resnet56-cifar10"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("argcomplete")
    assert main(["completion", shell]) == 0
    assert "_ARGCOMPLETE" in capsys.readouterr().out


def test_completion_of_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "bash" in capsys.readouterr().err


def test_completion_without_its_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'fastprune[completion]'" in capsys.readouterr().err
