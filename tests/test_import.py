"""``import fastprune`` costs next to nothing; its names cost what they need."""

from __future__ import annotations

import subprocess
import sys

import fastprune
import fastprune.methods


def modules_after(code: str) -> set[str]:
    """The modules that a fresh process has imported after some code."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_import_alone_loads_no_torch() -> None:
    loaded = modules_after("import fastprune, fastprune.methods\nfastprune.__version__")
    assert not {"torch", "torchvision", "numpy", "jsonargparse"} & loaded
    assert not any(name.startswith("fastprune.") and name != "fastprune.methods" for name in loaded)


def test_a_name_loads_its_own_module() -> None:
    loaded = modules_after("from fastprune import models\nmodels.available()")
    assert "fastprune.models" in loaded
    assert not {"fastprune.graph", "fastprune.ops", "fastprune.pruning"} & loaded


def test_every_name_is_there() -> None:
    for module in (fastprune, fastprune.methods):
        assert module.__all__ == sorted(module.__all__)
        assert set(module.__all__) <= set(dir(module))
        for name in module.__all__:
            assert getattr(module, name) is not None
    assert fastprune.methods.load("l1").name == "l1"
