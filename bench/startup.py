"""How much processor time fastprune takes to start: user and system time of fresh processes, medians in seconds.

    python bench/startup.py [--rounds 5]

The calls take turns, so that a slow minute of the machine hits all of them. The first round fills the caches (compiled
modules, descriptions of the methods) and is not counted. Run it where fastprune is installed.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

FASTPRUNE = (sys.executable, "-m", "fastprune")
CALLS: dict[str, Sequence[str]] = {
    "fastprune --version": (*FASTPRUNE, "--version"),
    "fastprune --help": (*FASTPRUNE, "--help"),
    "fastprune": FASTPRUNE,
    "fastprune prun": (*FASTPRUNE, "prun"),
    "fastprune prune --buget x": (*FASTPRUNE, "prune", "--buget", "x"),
    "fastprune methods": (*FASTPRUNE, "methods"),
    "python -c pass": (sys.executable, "-c", "pass"),
    "import torch": (sys.executable, "-c", "import torch"),
    "import fastprune": (sys.executable, "-c", "import fastprune"),
    "import torch, fastprune": (sys.executable, "-c", "import torch, fastprune"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    seconds: dict[str, list[float]] = {name: [] for name in CALLS}
    for number in range(rounds + 1):
        for name, call in CALLS.items():
            taken = processor_time(call)
            if number > 0:
                seconds[name].append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{median:6.3f} s  {name}")
    difference = medians["import torch, fastprune"] - medians["import torch"]
    print(f"{difference:6.3f} s  what importing fastprune adds to importing torch")


def processor_time(call: Sequence[str]) -> float:
    """Run a command and return the user and system time that it took, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
