"""Image data sets of the package ``datasets``: folders that it saved, folders of pictures, and names on its hub."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastprune.data.imagefolder import Transforms
from fastprune.data.sources import DatasetSource, Samples

TESTS = ("test", "validation", "val", "valid")
"""Names of the part to test on, by preference."""


class Pairs(Dataset[tuple[object, int]]):
    """The pictures of a data set in RGB, with their labels.

    Args:
        rows: one part of a data set.
        image: name of the column of pictures.
        label: name of the column of labels.
    """

    def __init__(self, rows: Any, image: str, label: str) -> None:
        self.rows, self.image, self.label = rows, image, label

    @property
    def targets(self) -> Sequence[int]:
        """All labels."""
        labels: Sequence[int] = self.rows[self.label]
        return labels

    def __getitem__(self, index: int) -> tuple[object, int]:
        row = self.rows[index]
        return row[self.image].convert("RGB"), int(row[self.label])


def read_hf(place: str, prepare: Transforms, workers: int) -> tuple[DatasetSource, DatasetSource, int]:
    """Open an image data set.

    Args:
        place: a folder that ``save_to_disk`` wrote, a folder of pictures, or a name on the hub.
        prepare: the preparation of pictures.
        workers: reading processes.

    Returns:
        Training set, test set and the number of classes.

    Raises:
        ValueError: if ``datasets`` is missing, the data set is not found, or it has no pictures, labels or test part.
    """
    name = f"hf:{place}"
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"data {name!r} needs datasets: pip install 'fastprune[hf]' ({error})") from error
    parts = open_parts(datasets, place)
    if not isinstance(parts, Mapping) or "train" not in parts:
        found = f"parts {', '.join(parts)}" if isinstance(parts, Mapping) else "one part without a name"
        raise ValueError(f"data {name!r} has {found}; a part 'train' is needed")
    test = next((part for part in TESTS if part in parts), None)
    if test is None:
        raise ValueError(f"data {name!r} has the parts {', '.join(parts)}; one of {', '.join(TESTS)} is needed too")
    features = parts["train"].features
    image = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    label = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(image) != 1 or len(label) != 1:
        raise ValueError(
            f"data {name!r}: one column of pictures and one of class labels are needed, it has "
            f"{len(image)} and {len(label)} ({', '.join(features)}); keep one of each (remove_columns, cast_column)"
        )
    sources = [
        DatasetSource(Samples(Pairs(rows, image[0], label[0]), *prepare), len(rows), workers)
        for rows in (parts["train"], parts[test])
    ]
    return sources[0], sources[1], features[label[0]].num_classes


def open_parts(datasets: Any, place: str) -> Any:
    """Return the parts of a data set by name."""
    folder = Path(place).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))
        if folder.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(folder))
        return datasets.load_dataset(place)
    except Exception as error:  # of many kinds: no such name, no network, damaged files
        what = "cannot be read" if folder.is_dir() else "is no folder, and cannot be fetched from the hub"
        raise ValueError(f"data 'hf:{place}' {what}: {' '.join(str(error).split())}") from error
