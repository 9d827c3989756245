"""What a user chooses of a compensation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastprune.recovery.compensation import CALIBRATION_IMAGES, How, require_kind


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

    def require_data(self, data: object) -> None:
        """Refuse to compensate without data."""
        if self.how != "none" and data is None:
            raise ValueError(f"compensate {self.how!r} needs calibration images: give data=")

    def settings(self) -> dict[str, Any]:
        """Return the fields as options of the command line."""
        return {"compensate": self.how, "calibration": self.images}
