"""``fastprune methods``. It imports torch only for methods that have changed since they were last described."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fastprune.cli.settings import MethodsSettings, pick
from fastprune.methods import catalogue
from fastprune.report import tables


def run_methods(values: dict[str, Any], given: set[str]) -> int:
    """List the installed methods, or the options of one."""
    name = pick(MethodsSettings, values).name
    found, broken = catalogue.survey() if name is None else ({name: catalogue.find(name)}, {})
    if values["json"]:
        print(json.dumps([asdict(info) for info in found.values()], default=str))
    elif name is not None:
        tables.print_method(found[name])
    else:
        tables.print_methods(found.values())
    tables.print_broken(broken)
    return 0
