"""Reading data sets: values, parts and errors."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastprune.data import SourceData, load_data
from fastprune.data.archives import CIFAR10, CIFAR100, read_cifar, read_idx
from fastprune.data.plain_pickle import read_plain_pickle

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def made_mnist(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 50), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


def parts(data: SourceData) -> tuple[int, int, int]:
    return data.size("train"), data.size("held_out"), data.size("test")


def test_idx_equals_the_bytes(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "x.gz", values)
    assert np.array_equal(read_idx(tmp_path / "x.gz", 3).numpy(), values)


def test_made_fashion_mnist(made_mnist: Path) -> None:
    data = load_data(f"fashion-mnist:{made_mnist}")
    assert data.shape == (1, 28, 28)
    assert data.num_classes == 10
    assert parts(data) == (45, 5, 20)
    images, labels = next(data.batches("test", 20))
    assert torch.equal(labels, torch.arange(20) % 10)
    raw = read_idx(made_mnist / "t10k-images-idx3-ubyte.gz", 3).double()
    train = read_idx(made_mnist / "train-images-idx3-ubyte.gz", 3).double()
    expected = (raw - train.mean()) / train.std()
    assert (images[:, 0] - expected).abs().max() < 1e-6


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Fashion-MNIST is not on this machine")
def test_real_fashion_mnist() -> None:
    data = load_data(f"fashion-mnist:{FASHION_MNIST}")
    assert parts(data) == (55_000, 5_000, 10_000)
    labels = torch.cat([labels for _, labels in data.batches("test", 1000)])
    assert torch.equal(labels.bincount(), torch.full((10,), 1000))
    assert labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "not a whole gzip file"),
        (lambda path: path.write_bytes(b"plain text"), "not a whole gzip file"),
        (lambda path: write_idx(path, np.zeros((3, 3))), "starts with 00000802"),
        (lambda path: write_idx(path, np.zeros((7, 28, 28))), "7 train images, but 50 labels"),
        (lambda path: path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 50, 28, 28))), "holds 0"),
        (lambda path: path.write_bytes(gzip.compress(b"\0\0\x08\x03\0\0")), "ends within its header"),
    ],
)
def test_damaged_fashion_mnist(made_mnist: Path, damage: object, message: str) -> None:
    damage(made_mnist / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match=message) as error:
        load_data(f"fashion-mnist:{made_mnist}")
    assert str(made_mnist) in str(error.value)


def write_cifar10(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    records = {}
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records[name] = random.integers(0, 256, (4, 3073)).astype(np.uint8)
        records[name][:, 0] %= 10
        records[name].tofile(folder / name)
    return records


def test_cifar10_binary(tmp_path: Path) -> None:
    records = write_cifar10(tmp_path / "cifar-10-batches-bin")
    images, labels = read_cifar(CIFAR10, tmp_path, "train")
    assert images.shape == (20, 3, 32, 32)
    assert np.array_equal(images[5].numpy().ravel(), records["data_batch_2.bin"][1, 1:])
    assert int(labels[5]) == records["data_batch_2.bin"][1, 0]
    data = load_data(f"cifar10:{tmp_path}", held_out=0.25)
    assert parts(data) == (15, 5, 4)
    assert data.shape == (3, 32, 32)


def write_python_cifar(folder: Path, names: list[str], labels: str, protocol: int) -> dict[str, dict[bytes, Any]]:
    """Write files as the Python version has them: with protocol 2 and bytes as keys, or as people write them again."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(2)
    written = {}
    for name in names:
        written[name] = {
            b"batch_label": b"a batch",
            labels.encode(): random.integers(0, 10, 4).tolist(),
            b"data": random.integers(0, 256, (4, 3072)).astype(np.uint8),
            b"filenames": [b"one.png", b"two.png", b"three.png", b"four.png"],
        }
        (folder / name).write_bytes(pickle.dumps(written[name], protocol))
    return written


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_the_python_version_of_cifar_is_read_without_unpickling(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ten = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    written = write_python_cifar(tmp_path / "cifar-10-batches-py", ten, "labels", protocol)
    hundred = write_python_cifar(tmp_path / "cifar-100-python", ["train", "test"], "fine_labels", protocol)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    images, labels = read_cifar(CIFAR10, tmp_path, "train")
    assert np.array_equal(images.flatten(1).numpy(), np.concatenate([written[name][b"data"] for name in ten[:5]]))
    assert labels.tolist() == [label for name in ten[:5] for label in written[name][b"labels"]]
    images, labels = read_cifar(CIFAR100, tmp_path, "test")
    assert np.array_equal(images.flatten(1).numpy(), hundred["test"][b"data"])
    assert labels.tolist() == hundred["test"][b"fine_labels"]
    assert parts(load_data(f"cifar100:{tmp_path}", held_out=1)) == (3, 1, 4)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Bomb(), "the name .*exec is not allowed"),
        ({b"data": np.zeros(3, dtype=np.float32)}, "not of bytes"),
        ({b"data": np.dtype("u1")}, "no array"),
        ({b"data": np.ndarray}, "a name in place of a value"),
        ({b"data": Path("x")}, "is not allowed"),
        ([1], "no array 'data'"),
        ({b"data": np.zeros((2, 3), dtype=np.uint8), b"labels": [0, 1]}, "3072 bytes per image"),
        ({b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0]}, "label for each image"),
        ({b"data": np.zeros((1, 3072), dtype=np.uint8), b"labels": [10]}, "label 10"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path: Path, value: Any, message: str, protocol: int) -> None:
    (tmp_path / "cifar").mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (tmp_path / "cifar" / name).write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(ValueError, match=message):
        load_data(f"cifar10:{tmp_path / 'cifar'}")


def test_a_pickle_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    whole = pickle.dumps({b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0, 1]}, 2)
    for length in (0, 1, 3, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="batch"):
            read_plain_pickle(path)


def test_cifar10_errors(tmp_path: Path) -> None:
    (tmp_path / "python" / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz or cifar-10-python\.tar\.gz"):
        load_data(f"cifar10:{tmp_path / 'python'}")
    with pytest.raises(ValueError, match=r"no data_batch_1\.bin"):
        load_data(f"cifar10:{tmp_path}")
    write_cifar10(tmp_path / "bin")
    path = tmp_path / "bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin.*multiple of the 3073"):
        load_data(f"cifar10:{tmp_path / 'bin'}")
    np.full(3073, 11, dtype=np.uint8).tofile(path)
    with pytest.raises(ValueError, match="label 11"):
        load_data(f"cifar10:{tmp_path / 'bin'}")


def test_digits_split_is_fixed_and_stratified() -> None:
    pytest.importorskip("sklearn")
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    assert parts(first) == (1294, 143, 360)
    test = [torch.cat([labels for _, labels in data.batches("test", 100)]) for data in (first, second)]
    assert torch.equal(test[0], test[1])
    assert int(test[0].bincount().min()) >= 35
    assert load_data("digits", image_size=16).shape == (1, 16, 16)


def test_held_out_never_meets_training() -> None:
    data = load_data("synthetic:1x4x997:3:101", seed=5, held_out=20)
    seen = {part: torch.cat([x.flatten(1) for x, _ in data.batches(part, 7)]) for part in ("train", "held_out")}
    assert len(seen["train"]) == 81
    assert len(seen["held_out"]) == 20
    assert torch.cdist(seen["train"], seen["held_out"]).min() > 1e-4
    other = load_data("synthetic:1x4x997:3:101", seed=6, held_out=20)
    assert not torch.equal(torch.cat([x.flatten(1) for x, _ in other.batches("held_out", 7)]), seen["held_out"])


@pytest.mark.parametrize("amount", [101, -1, 1.0])
def test_held_out_errors(amount: float) -> None:
    with pytest.raises(ValueError, match="held_out"):
        load_data("synthetic:1x4x4:3:101", held_out=amount)


def test_synthetic_is_learnable_and_repeatable() -> None:
    data = load_data("synthetic:3x32x32:5:400")
    again = load_data("synthetic:3x32x32:5:400", seed=3)
    x, y = next(data.batches("test", 100))
    assert torch.equal(x, next(again.batches("test", 100))[0])
    train_x, train_y = next(data.batches("train", 300))
    centres = torch.stack([train_x[train_y == label].mean(0) for label in range(5)])
    nearest = torch.cdist(x.flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == y).float().mean() > 0.9


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "unknown; give one of"),
        ("digits:x", "unknown"),
        ("synthetic:3x4:5", "CxHxW"),
        ("synthetic:3x4x4:0", "at least 1"),
        ("cifar10:", "is no folder"),
        ("imagefolder:/no/such/folder", "is no folder"),
    ],
)
def test_unknown_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(spec)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    pytest.importorskip("torchvision")
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_imagefolder(pictures: Path, workers: int) -> None:
    data = load_data(f"imagefolder:{pictures}", image_size=32, workers=workers)
    assert parts(data) == (11, 1, 4)
    assert data.num_classes == 2
    assert data.pixel_std == (0.229, 0.224, 0.225)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    whole = list(data.batches("train", 4, seed=1, epoch=2, augment=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(labels) for _, labels in whole] == [4, 4, 3]
    assert whole[0][0].shape == (4, 3, 32, 32)
    resumed = list(data.batches("train", 4, seed=1, epoch=2, start=2, augment=True))
    assert torch.equal(resumed[0][0], whole[2][0])
    assert torch.equal(resumed[0][1], whole[2][1])
    plain = list(data.batches("train", 4, seed=1, epoch=2))
    assert not torch.equal(plain[0][0], whole[0][0])


def test_imagefolder_errors(pictures: Path) -> None:
    (pictures / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match="emu"):
        load_data(f"imagefolder:{pictures}")
    (pictures / "train" / "emu").rmdir()
    for file in (pictures / "val" / "dog").iterdir():
        file.unlink()
    (pictures / "val" / "dog").rmdir()
    with pytest.raises(ValueError, match=r"different classes.*dog"):
        load_data(f"imagefolder:{pictures}")
    (pictures / "val").rename(pictures / "test")
    with pytest.raises(ValueError, match="no folder 'val'"):
        load_data(f"imagefolder:{pictures}")


@pytest.mark.parametrize("saved", [True, False])
def test_image_data_sets_of_the_package_datasets(tmp_path: Path, saved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for index in range(count):
            folder = tmp_path / "pictures" / part / ("cat", "dog")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    place = tmp_path / "pictures"
    if saved:
        datasets.load_dataset("imagefolder", data_dir=str(place)).save_to_disk(str(tmp_path / "saved"))
        place = tmp_path / "saved"
    data = load_data(f"hf:{place}", image_size=16, held_out=2, workers=0)
    assert parts(data) == (4, 2, 4)
    assert (data.shape, data.num_classes) == ((3, 16, 16), 2)
    images, labels = next(data.batches("test", 4))
    assert images.shape == (4, 3, 16, 16)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    other, _ = next(
        load_data(f"hf:{place}", image_size=16, held_out=2, workers=0, mean=[0] * 3, std=[1] * 3).batches("test", 4)
    )
    imagenet = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close((other - imagenet[0][:, None, None]) / imagenet[1][:, None, None], images)
    with pytest.raises(ValueError, match="cannot be fetched from the hub"):
        load_data("hf:no-such-owner/no-such-set")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'fastprune\[hf\]'"):
        load_data("hf:anything")


def test_the_scale_of_pixels(made_mnist: Path) -> None:
    raw = load_data(f"fashion-mnist:{made_mnist}", mean=[0.0], std=[1.0])
    own = load_data(f"fashion-mnist:{made_mnist}", mean=[0.5], std=[0.25])
    images, scaled = (next(data.batches("test", 20))[0] for data in (raw, own))
    assert 0 <= float(images.min()) < 0.01
    assert 0.99 < float(images.max()) <= 1
    torch.testing.assert_close(scaled, (images - 0.5) / 0.25)
    for arguments, message in (
        ({"mean": [0.5]}, "both are needed"),
        ({"mean": [0.5] * 3, "std": [1.0] * 3}, r"1 channel\(s\)"),
        ({"mean": [0.5], "std": [0.0]}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(f"fashion-mnist:{made_mnist}", **arguments)
