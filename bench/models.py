"""The models of `bench train` and `bench step`: pure functions of weights and input.

No dropout and no batch norm, so that a replica can be computed by ``torch.func`` for all ranks at
once, and so that what is compared is the averaging of weights and nothing beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 32
"""Characters that `Gpt` sees."""


class LeNet(nn.Sequential):
    """LeNet-5's layers at the size of 1x8x8 images: 19,754 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 6, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 2 * 2, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, classes),
        )


class ConvNet(nn.Sequential):
    """Three convolutions, strides in place of pooling, one linear layer, for 1x8x8 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, classes),
        )


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, out - into
        self.body = nn.Sequential(
            nn.Conv2d(into, out, kernel_size=3, padding=1, stride=stride, bias=False),
            nn.GroupNorm(8, out),
            nn.ReLU(),
            nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(8, out),
        )

    def forward(self, x: Tensor) -> Tensor:
        short = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(short + self.body(x))


class ResNet20(nn.Sequential):
    """ResNet-20 (He et al. 2016, section 4.2) for 1x32x32 images: 269,434 parameters.

    Norms are over groups of channels (Wu and He 2018), not over the batch.
    """

    def __init__(self, classes: int = 10) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(8, 16),
            nn.ReLU(),
        ]
        into = 16
        for width in (16, 32, 64):
            for block in range(3):
                layers.append(Residual(into, width, stride=1 if width == 16 or block else 2))
                into = width
        super().__init__(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, classes))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, figure 5).

    The stride is the 3x3 convolution's, as in torchvision.
    """

    def __init__(self, into: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *_normed(into, width, 1),
            nn.ReLU(),
            *_normed(width, width, 3, stride),
            nn.ReLU(),
            *_normed(width, out, 1),
        )
        self.short = nn.Sequential(*(_normed(into, out, 1, stride) if project else ()))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.body(x))


def _normed(into: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    plain = nn.Conv2d(into, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [plain, nn.GroupNorm(32, out)]


class ResNet50(nn.Sequential):
    """ResNet-50 (He et al. 2016) for 1000 classes: 25,557,032 parameters in 161 tensors.

    Shapes of parameters are the original's; norms are over groups of channels, not over the batch.
    Images of shape (n, 1, 8, 8) are enlarged to (n, 3, 224, 224) first.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = [
            Enlarged(28),
            *_normed(3, 64, 7, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        into = 64
        for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                stride = 2 if block == 0 and width > 64 else 1
                layers.append(Bottleneck(into, width, stride, project=block == 0))
                into = 4 * width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 1000))


class Enlarged(nn.Module):
    """(n, 1, h, w) to (n, 3, times h, times w): each pixel a square of one grey."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x.expand(-1, 3, -1, -1), scale_factor=self.times)


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (
            each.reshape(shape).transpose(1, 2)
            for each in self.qkv(self.before(x)).split(width, dim=-1)
        )
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        attention = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(batch, length, width))
        fed: Tensor = x + self.feed(x)
        return fed


class Gpt(nn.Module):
    """A character model: embeddings, two blocks, a linear head. (batch, length) to logits."""

    def __init__(self, vocabulary: int, width: int = 64, heads: int = 2, blocks: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.characters.weight, std=0.1)
        nn.init.normal_(self.places, std=0.1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.characters(codes) + self.places[: codes.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, over samples or over their characters."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
