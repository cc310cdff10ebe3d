"""The networks of the examples: LeNet of the demo, and those GossipGraD was tried on.

They are kept apart from the training scripts so that those show only what a user of the library
writes. All take float images of shape (batch, channels, height, width) and give logits of shape
(batch, classes). Parameters are counted with the default number of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling, for 1x28x28 images: 61,706 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


class CIFARNet(nn.Module):
    """Caffe's cifar10_quick (Jia et al. 2014), for 3x32x32 images: 145,578 parameters.

    Its pooling windows reach over the edge (Caffe rounds up): 32, 16, 8, 4 pixels wide. First
    weights are torch's own, not Caffe's Gaussians.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=5, padding=2),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(3, stride=2, ceil_mode=True),
            nn.Conv2d(32, 64, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(3, stride=2, ceil_mode=True),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.Linear(64, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _normed(into: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size but for its stride, and batch norm in place of a bias."""
    convolution = nn.Conv2d(into, out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out))


def _unit(into: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return _normed(into, out, kernel, stride).append(nn.ReLU(inplace=True))


def _halve() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, padding=1)


class Inception(nn.Module):
    """Four views of the same input side by side: 1x1, 3x3, 5x5 and pooled.

    A pair is (channels of the 1x1 convolution before, channels out).
    """

    def __init__(
        self, into: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _unit(into, one, 1),
                nn.Sequential(_unit(into, three[0], 1), _unit(*three, 3)),
                nn.Sequential(_unit(into, five[0], 1), _unit(*five, 5)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _unit(into, pooled, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class GoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al. 2015, table 1) with batch norm, for 3x224x224 images.

    7,005,832 parameters: the paper's 6,998,552 and, for each of the 7,280 channels of its
    convolutions, a factor and an offset in place of a bias. Works from 32x32 pixels on.

    auxiliary: while training, give (logits, side, side), of which the sides count 0.3 in the
    loss, as in the paper; they add 6,379,984 parameters and need the full 224x224 pixels.
    """

    def __init__(self, classes: int = 1000, auxiliary: bool = False) -> None:
        super().__init__()
        self.lower = nn.Sequential(
            _unit(3, 64, 7, stride=2),
            _halve(),
            _unit(64, 64, 1),
            _unit(64, 192, 3),
            _halve(),
            Inception(192, 64, (96, 128), (16, 32), 32),
            Inception(256, 128, (128, 192), (32, 96), 64),
            _halve(),
            Inception(480, 192, (96, 208), (16, 48), 64),
        )
        self.middle = nn.Sequential(
            Inception(512, 160, (112, 224), (24, 64), 64),
            Inception(512, 128, (128, 256), (24, 64), 64),
            Inception(512, 112, (144, 288), (32, 64), 64),
        )
        self.upper = nn.Sequential(
            Inception(528, 256, (160, 320), (32, 128), 128),
            _halve(),
            Inception(832, 256, (160, 320), (32, 128), 128),
            Inception(832, 384, (192, 384), (48, 128), 128),
        )
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(1024, classes)
        )
        self.sides = nn.ModuleList([_side(512, classes), _side(528, classes)] if auxiliary else [])

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        low = self.lower(images)
        mid = self.middle(low)
        logits: Tensor = self.classifier(self.upper(mid))
        if self.training and self.sides:
            return logits, *(side(x) for side, x in zip(self.sides, (low, mid), strict=True))
        return logits


def _side(into: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.AvgPool2d(5, stride=3),
        _unit(into, 128, 1),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 1024),
        nn.ReLU(inplace=True),
        nn.Dropout(0.7),
        nn.Linear(1024, classes),
    )


class Bottleneck(nn.Module):
    """A residual block that computes at `width` channels between 1x1 convolutions."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.residual = nn.Sequential(
            _unit(into, width, 1), _unit(width, width, 3, stride), _normed(width, out, 1)
        )
        same = into == out and stride == 1
        self.shortcut = nn.Identity() if same else _normed(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2016), for 3x224x224 images: 25,557,032 parameters in 161 tensors.

    The stride is in the 3x3 convolution of a block, as Goyal et al. 2017 train it; the paper has
    it in the 1x1 before. Works from 32x32 pixels on.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_unit(3, 64, 7, stride=2), _halve()]
        into = 64
        for width, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for block in range(blocks):
                layers.append(Bottleneck(into, width, first_stride if block == 0 else 1))
                into = 4 * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


class Architecture(NamedTuple):
    """A network by what it is fed and what it tells apart; the factory takes `classes`."""

    factory: Callable[[int], nn.Module]
    shape: tuple[int, int, int]  # channels, height, width of an image
    classes: int


MODELS: dict[str, Architecture] = {
    "lenet": Architecture(LeNet, (1, 28, 28), 10),
    "cifarnet": Architecture(CIFARNet, (3, 32, 32), 10),
    "googlenet": Architecture(GoogLeNet, (3, 224, 224), 1000),
    "resnet50": Architecture(ResNet50, (3, 224, 224), 1000),
}


def flat_parameters(model: nn.Module) -> Tensor:
    """All parameters of `model` as one new 1-D tensor."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
