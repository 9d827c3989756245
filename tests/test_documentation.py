"""The blocks of README and guides run as they are printed, in their order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_shell(code: str, folder: Path) -> None:
    # The script of the environment that runs the tests, also where that is not activated.
    command = f"fastprune() {{ '{sys.executable}' -m fastprune \"$@\"; }}\n{code}"
    done = subprocess.run(["bash", "-e", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/own_networks.md"])
def test_blocks_run_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTPRUNE_CACHE", str(tmp_path / "cache"))
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {"__name__": "__main__"}
    for language, code in blocks:
        if language == "sh":
            run_shell(code, tmp_path)
        else:
            exec(compile(code, page, "exec"), names)
