"""What a user chooses of a compensation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastprune.recovery.compensation import CALIBRATION_IMAGES, COMPENSATIONS, How, require_kind

Choice = How | Literal["auto"]
CHOICES: tuple[Choice, ...] = ("auto", *COMPENSATIONS)


@dataclass(frozen=True)
class Recovery:
    """What is done for accuracy after the cut, without training.

    Args:
        how: the kind of compensation.
        images: number of calibration samples.

    Raises:
        ValueError: for an unknown kind, or fewer than one sample.
    """

    how: How = "none"
    images: int = CALIBRATION_IMAGES

    def __post_init__(self) -> None:
        require_kind(self.how)
        if self.images < 1:
            raise ValueError(f"calibration: got {self.images}; at least 1 sample is needed")

    @staticmethod
    def choose(how: Choice, images: int, data: object) -> Recovery:
        """Return what a user asks for; "auto" is "sequential" where there are data, otherwise "none".

        Args:
            how: the kind of compensation, or "auto".
            images: number of calibration samples.
            data: the training data; None = there are none.

        Raises:
            ValueError: for an unknown kind, fewer than one sample, or a kind that lacks its data.
        """
        if how not in CHOICES:
            raise ValueError(f"compensate: got {how!r}; choose one of {', '.join(CHOICES)}")
        if how == "auto":
            return Recovery("none" if data is None else "sequential", images)
        if how != "none" and data is None:
            raise ValueError(f"compensate {how!r} needs calibration images: give data=")
        return Recovery(how, images)

    def settings(self) -> dict[str, Any]:
        """Return the fields as options of the command line."""
        return {"compensate": self.how, "calibration": self.images}
