"""What `bench train` trains: data that every machine has, and models small enough to repeat.

Digits ship inside scikit-learn, the text is the Python standard library's own source. All that is
drawn (weights, shards, batches) is drawn from a seed, the same for every method and for simulated
and real ranks, so that two methods differ in nothing but how they communicate.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ucxgossip.bench.models import CONTEXT, ConvNet, Gpt, LeNet, ResNet20, ResNet50
from ucxgossip.errors import ArgumentError, BenchError

SHARDS = ("iid", "skewed")
_SPLIT_SEED = 0
_TEST_IMAGES = 450
_TEST_WINDOWS = 256

_MODULES = (
    "argparse", "ast", "calendar", "cmd", "codecs", "configparser", "csv", "dataclasses",
    "datetime", "difflib", "dis", "doctest", "enum", "fractions", "ftplib", "functools",
    "gettext", "gzip", "heapq", "imaplib", "inspect", "ipaddress", "mailbox", "mimetypes",
    "nntplib", "optparse", "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib",
    "pprint", "pyclbr", "random", "shutil", "smtplib", "socket", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback",
    "turtle", "typing", "uuid", "weakref", "zipfile",
)  # fmt: skip
_TEST_MODULES = ("copy", "fileinput", "glob", "locale", "queue", "selectors", "shelve", "trace")
_VOCABULARY = "\n " + "".join(map(chr, range(33, 127)))
"""Printable ASCII; any other character of the source counts as the last."""


@dataclass(frozen=True)
class Task:
    """A model and its data, in memory.

    inputs, targets: training samples along the first axis; labels: what skewed shards are cut by,
    in `cuts` pieces a rank. make: a new model with weights drawn from torch's generator. text:
    whether targets are the next characters, judged by their loss, and not classes.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    labels: NDArray[np.int64]
    test_inputs: Tensor
    test_targets: Tensor
    make: Callable[[], nn.Module]
    cuts: int = 2
    text: bool = False

    def model(self, seed: int) -> nn.Module:
        """A new model; the same weights for the same seed. torch's generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def shards(self, ranks: int, kind: str, seed: int) -> list[NDArray[np.int64]]:
        """Which training samples each rank has, disjoint and equally many.

        ``"iid"``: a shuffled split. ``"skewed"``: sorted by label and cut in pieces, of which each
        rank gets `cuts`: about as many labels a rank.
        """
        order = np.random.default_rng((seed, 0)).permutation(len(self.labels))
        pieces = ranks
        if kind == "skewed":
            order = order[np.argsort(self.labels[order], kind="stable")]
            pieces = ranks * self.cuts
        elif kind != "iid":
            raise ArgumentError(f"unknown shards {kind!r}; choose one of {', '.join(SHARDS)}")
        length = len(order) // pieces
        if length < 1:
            raise ArgumentError(f"{len(order)} samples are too few for {ranks} ranks")
        cut = order[: pieces * length].reshape(pieces, length)
        if kind == "skewed":
            cut = cut[np.random.default_rng((seed, 1)).permutation(pieces)]
        return list(cut.reshape(ranks, -1))


def batch(shard: NDArray[np.int64], count: int, seed: int, rank: int, step: int) -> Any:
    """The samples of one rank's step: `count` different ones of its shard, by seed, rank, step."""
    chosen = np.random.default_rng((seed, rank, step, 2)).choice(len(shard), count, replace=False)
    return shard[chosen]


def load(name: str) -> Task:
    """The task of a model: lenet, convnet, resnet20, resnet50: digits; gpt, gpt4: text."""
    if name not in TASKS:
        raise ArgumentError(f"unknown model {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]()


def _digits(name: str, make: Callable[[], nn.Module], enlarged: int = 1) -> Task:
    """Images of shape (n, 1, 8, 8), standardised with the training set's mean and deviation.

    enlarged: each pixel becomes a square of so many by so many.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BenchError(
            f"bench train --model {name}: the digits are scikit-learn's, which is not installed; "
            "run pip install scikit-learn"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    pixels, labels = pixels[order].reshape(-1, 1, 8, 8), labels[order].astype(np.int64)
    train = pixels[_TEST_IMAGES:]
    images = torch.from_numpy(((pixels - train.mean()) / train.std()).astype(np.float32))
    images = images.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
    targets = torch.from_numpy(labels)
    return Task(
        name,
        images[_TEST_IMAGES:],
        targets[_TEST_IMAGES:],
        labels[_TEST_IMAGES:],
        images[:_TEST_IMAGES],
        targets[:_TEST_IMAGES],
        make,
    )


def _windows(modules: tuple[str, ...]) -> tuple[Tensor, NDArray[np.int64]]:
    """Rows of CONTEXT + 1 characters of the modules' source, and the module of each row."""
    code = {character: index for index, character in enumerate(_VOCABULARY)}
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: list[NDArray[np.int64]] = []
    origin: list[int] = []
    for number, module in enumerate(modules):
        path = root / f"{module}.py"
        if not path.exists():  # removed from later Pythons
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        codes = np.array([code.get(each, len(code) - 1) for each in text], dtype=np.int64)
        count = (len(codes) - 1) // CONTEXT
        starts = np.arange(count)[:, None] * CONTEXT
        rows.append(codes[starts + np.arange(CONTEXT + 1)])
        origin += [number] * count
    if not rows:
        raise BenchError(
            f"bench train --model gpt: the standard library's source is not in {root}; "
            "use a Python that has it"
        )
    return torch.from_numpy(np.concatenate(rows)), np.array(origin)


def _gpt(name: str, width: int = 64, heads: int = 2, blocks: int = 2) -> Task:
    """Windows of the standard library's source; skewed: each rank its own modules."""
    train, origin = _windows(_MODULES)
    test, _ = _windows(_TEST_MODULES)
    spread = torch.arange(_TEST_WINDOWS) * len(test) // _TEST_WINDOWS
    test = test[spread]
    return Task(
        name,
        train[:, :-1],
        train[:, 1:],
        origin,
        test[:, :-1],
        test[:, 1:],
        lambda: Gpt(len(_VOCABULARY), width, heads, blocks),
        cuts=1,
        text=True,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "lenet": lambda: _digits("lenet", LeNet),
    "convnet": lambda: _digits("convnet", ConvNet),
    "resnet20": lambda: _digits("resnet20", ResNet20, enlarged=4),
    "resnet50": lambda: _digits("resnet50", ResNet50),
    "gpt": lambda: _gpt("gpt"),
    "gpt4": lambda: _gpt("gpt4", width=128, heads=4, blocks=4),
}
