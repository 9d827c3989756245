"""The pair (seed, step) that decides which noise a stochastic operator draws.

Noise is a function of (seed, step, unit), so nothing is stored, nothing depends on what the process drew before, and
every rank and device draws the same. Two calls with the same seed and step draw the same noise: callers that draw twice
in a step have to count the calls.
"""

import torch
from torch import Tensor

LIMIT = 2**63
"""Seeds and steps are below this: they are passed as int64."""


def split_step(seed: int, step: int | Tensor) -> tuple[int, Tensor | None]:
    """Split the step into an int, and a tensor that replaces it if the step is one.

    Raises:
        TypeError: The seed or the step has another type.
        ValueError: One of them is outside of [0, 2^63).
    """
    _check("seed", seed, "an int")
    if isinstance(step, Tensor):
        return 0, step
    _check("step", step, "an int or an int64 tensor without dimensions")
    return step, None


def _check(name: str, value: object, needs: str) -> None:
    # The dispatcher would refuse a wrong type, or an int above int64, without saying which argument it was.
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: got an object of type {type(value).__name__}, needs {needs}")
    if not 0 <= value < LIMIT:
        raise ValueError(f"{name}: got {value}, needs a whole number from 0 to 2^63 - 1")
