"""scikit-learn's digits for data-parallel training: one fixed split, sharded by rank.

The data set ships inside scikit-learn, so the demo downloads nothing. Its 8x8 images are
brought to LeNet's 28x28 once, at load time. All in memory: no worker processes, no data set
class, nothing that could blur a step's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT_SEED = 0
TEST_FRACTION = 0.25
IMAGE_SIZE = 28


class Samples(NamedTuple):
    """Images of shape (n, 1, 28, 28), normalised, and their labels of shape (n,)."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Samples, Samples]:
    """The training and the test set: stratified, and the same in every process and run."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=TEST_FRACTION, stratify=labels, random_state=SPLIT_SEED
    )
    mean, std = train_x.mean(), train_x.std()
    return (
        Samples(_images((train_x - mean) / std), torch.from_numpy(train_y).long()),
        Samples(_images((test_x - mean) / std), torch.from_numpy(test_y).long()),
    )


def _images(pixels: np.ndarray) -> Tensor:
    """Rows of 64 pixels as 1x28x28 images."""
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
    return F.interpolate(images, size=IMAGE_SIZE, mode="bilinear", align_corners=False)


def shard(samples: Samples, rank: int, size: int, seed: int) -> Samples:
    """Rank `rank`'s part of `samples`: drawn at random (IID), disjoint, of equal length."""
    order = np.random.default_rng(seed).permutation(len(samples.labels))
    mine = torch.from_numpy(order[rank::size][: len(order) // size])
    return Samples(samples.images[mine], samples.labels[mine])


class Loader:
    """Batches of one rank's samples, shuffled anew each epoch by seed, rank and epoch.

    The last, incomplete batch is dropped: every rank takes the same number of equal steps.
    """

    def __init__(self, samples: Samples, batch: int, *, rank: int, seed: int) -> None:
        if not 1 <= batch <= len(samples.labels):
            raise ValueError(
                f"batch of {batch} samples from a shard of {len(samples.labels)}: "
                "choose a batch from 1 to the length of the shard"
            )
        self.samples = samples
        self.batch = batch
        self.rank = rank
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples.labels) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng((self.seed, self.rank, self.epoch))
        self.epoch += 1
        order = torch.from_numpy(rng.permutation(len(self.samples.labels)))
        for chosen in order.split(self.batch)[: len(self)]:
            yield self.samples.images[chosen], self.samples.labels[chosen]
