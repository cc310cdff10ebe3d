"""Images to train on: CIFAR-10 and ImageNet for those who have them, else made-up ones.

Nothing is downloaded. A data set gives (image, label): a normalised float image of shape
(channels, height, width) and a class number from 0.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Shape = tuple[int, int, int]  # channels, height, width

CIFAR_SHAPE = (3, 32, 32)
CIFAR_CLASSES = 10
CIFAR_FOLDER = "cifar-10-batches-py"
SYNTHETIC_IMAGES = 32
IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png"}
# Of each channel over the training images, as everybody's: red, green, blue from 0 to 1.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(Exception):
    """Data that are not there or not what they should be; the message says where."""


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images and their classes, of which it is known how many there are."""

    def __len__(self) -> int:
        raise NotImplementedError


class Data(NamedTuple):
    """What to train on, what to measure accuracy on where there is some, and how many classes."""

    train: Labelled
    validation: Labelled | None
    classes: int


def load(source: str, shape: Shape, classes: int) -> Data:
    """The data of `source` for a model that takes `shape` and by default knows `classes`.

    source: ``synthetic``, ``cifar10:DIR`` or ``imagenet:DIR``. ImageNet's images are brought to
    `shape`, others must have it; the classes are those of the data.
    """
    kind, _, folder = source.partition(":")
    if kind == "synthetic" and not folder:
        return Data(Synthetic(shape, classes), None, classes)
    if kind == "cifar10" and folder:
        if shape != CIFAR_SHAPE:
            raise DataError(f"CIFAR-10's images are {_x(CIFAR_SHAPE)}, the model takes {_x(shape)}")
        return cifar10(Path(folder))
    if kind == "imagenet" and folder:
        if shape[0] != 3 or shape[1] != shape[2]:
            raise DataError(f"ImageNet's images are square and of 3 colours, not {_x(shape)}")
        return imagenet(Path(folder), shape[1])
    raise DataError(f"no data {source!r}: choose synthetic, cifar10:DIR or imagenet:DIR")


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes of shape (channels, height, width) as floats of mean 0 and deviation 1 or so."""
    centre, spread = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return (pixels.float() / 255 - centre) / spread


# --- synthetic -------------------------------------------------------------------------------


class Synthetic(Labelled):
    """Noise with labels: a few images over and over, so that making them costs no time.

    For the time of a step; there is nothing to learn but those few by heart.
    """

    def __init__(self, shape: Shape, classes: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(SYNTHETIC_IMAGES, *shape, generator=generator)
        self.classes = classes

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        which = index % SYNTHETIC_IMAGES
        return self.images[which], which % self.classes


# --- CIFAR-10 --------------------------------------------------------------------------------


class InMemory(Labelled):
    """Images kept as bytes of shape (n, channels, height, width), normalised when asked for."""

    def __init__(self, pixels: Tensor, labels: list[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalised(self.pixels[index], CIFAR_MEAN, CIFAR_STD), self.labels[index]


def cifar10(folder: Path) -> Data:
    """CIFAR-10 in its Python form, from ``cifar-10-batches-py`` or the folder that holds it."""
    if (folder / CIFAR_FOLDER).is_dir():
        folder = folder / CIFAR_FOLDER
    train = [_read_batch(folder / f"data_batch_{number}") for number in range(1, 6)]
    pixels = torch.cat([batch.pixels for batch in train])
    labels = [label for batch in train for label in batch.labels]
    return Data(InMemory(pixels, labels), _read_batch(folder / "test_batch"), CIFAR_CLASSES)


def _read_batch(path: Path) -> InMemory:
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path} is not a batch of CIFAR-10's Python form: {error}") from None
    pixels, labels = (batch.get(key) if isinstance(batch, dict) else None for key in _BATCH_KEYS)
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and isinstance(labels, list)
        and pixels.shape == (len(labels), math.prod(CIFAR_SHAPE))
        and all(isinstance(label, int) and 0 <= label < CIFAR_CLASSES for label in labels)
    ):
        raise DataError(
            f"{path} is not a batch of CIFAR-10's Python form: it wants 'data', bytes of shape "
            f"(n, {math.prod(CIFAR_SHAPE)}), and 'labels', n numbers from 0 to 9"
        )
    return InMemory(torch.from_numpy(pixels.copy()).view(-1, *CIFAR_SHAPE), labels)


_BATCH_KEYS = (b"data", b"labels")


class _ArraysOnly(pickle.Unpickler):
    """Admits NumPy arrays and plain values: a pickle may else run any code when it is loaded."""

    def find_class(self, module: str, name: str) -> Any:
        # Named as in the files, which are older than the names NumPy has for them today.
        admitted = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _dtype,
        }
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return admitted[module, name]


def _dtype(name: bytes | str, *_: object) -> np.dtype[Any]:
    """A dtype without the old pickles' 0 and 1 for align and copy, of which NumPy now warns."""
    return np.dtype(name.decode() if isinstance(name, bytes) else name)


# --- ImageNet --------------------------------------------------------------------------------


def imagenet(folder: Path, size: int) -> Data:
    """ImageNet as ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``, at `size` pixels square.

    Training images are cut at random and mirrored (Szegedy et al. 2015), those for validation
    are the centre. Without ``val/`` there is no validation. Reads by Pillow.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise DataError("reading images needs Pillow: pip install pillow") from None
    names = _class_names(folder / "train")
    train = ImageFolder(folder / "train", names, size, random=True)
    if not (folder / "val").is_dir():
        return Data(train, None, len(names))
    return Data(train, ImageFolder(folder / "val", names, size, random=False), len(names))


def _class_names(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from None
    if not names:
        raise DataError(f"{folder} holds no folder; it wants one for each class")
    return names


class ImageFolder(Labelled):
    """The images in a folder for each class; the classes are numbered as in `names`."""

    def __init__(self, folder: Path, names: list[str], size: int, *, random: bool) -> None:
        if unknown := sorted(set(_class_names(folder)) - set(names)):
            raise DataError(f"{folder / unknown[0]}: there is no such class in the training images")
        self.size, self.random = size, random
        self.files = [
            (path, number)
            for number, name in enumerate(names)
            for path in sorted((folder / name).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self.files:
            raise DataError(f"{folder} holds no image that ends in {', '.join(IMAGE_SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, ImageOps

        path, number = self.files[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for damaged files
            raise DataError(f"{path}: {error}") from None
        box = (_random_box if self.random else _central_box)(*image.size)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        if self.random and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return normalised(pixels, IMAGENET_MEAN, IMAGENET_STD), number


Box = tuple[float, float, float, float]  # left, upper, right, lower


def _central_box(width: int, height: int) -> Box:
    """The middle square, of 7/8 of the shorter side: 224 of 256 pixels."""
    side = 0.875 * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def _random_box(width: int, height: int) -> Box:
    """8 to 100 % of the area, sides within 3:4; the middle where ten draws do not fit."""
    for _ in range(10):
        share, tilt, x, y = torch.rand(4).tolist()
        area = width * height * (0.08 + 0.92 * share)
        ratio = (4 / 3) ** (2 * tilt - 1)  # even on a logarithmic scale
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            left, upper = x * (width - wide), y * (height - high)
            return left, upper, left + wide, upper + high
    return _central_box(width, height)
