"""The examples for images: networks under `attach`, loaders of data made here, one torchrun job."""

from __future__ import annotations

import importlib.util
import math
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucxgossip as ug

EXAMPLES = Path(__file__).parents[1] / "examples"
DEADLINE_S = 100.0
Ranks = Callable[..., list[Any]]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models, images = load("models"), load("images")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("lenet", 61_706, 10),
        ("cifarnet", 145_578, 10),
        ("googlenet", 7_005_832, 173),
        ("resnet50", 25_557_032, 161),
    ],
)
def test_networks_have_the_size_of_their_papers(name: str, parameters: int, tensors: int) -> None:
    model = models.MODELS[name].factory(models.MODELS[name].classes)
    sizes = [p.numel() for p in model.parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)


@pytest.mark.parametrize("name", ["lenet", "cifarnet", "googlenet", "resnet50"])
def test_networks_take_the_shape_they_are_listed_with(name: str) -> None:
    model = models.MODELS[name].factory(7).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, *models.MODELS[name].shape)).shape == (1, 7)


def test_layers_shrink_as_in_the_papers() -> None:
    with torch.no_grad():
        assert models.CIFARNet().features(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 4, 4)
        x = torch.zeros(1, 3, 224, 224)
        assert models.ResNet50().eval().features(x).shape == (1, 2048, 7, 7)
        net = models.GoogLeNet().eval()
        assert net.lower(x).shape == (1, 512, 14, 14)
        assert net.upper(net.middle(net.lower(x)))[0].shape == (1024, 7, 7)


def test_auxiliary_heads_speak_in_training_only() -> None:
    net = models.GoogLeNet(5, auxiliary=True)
    x = torch.zeros(2, 3, 224, 224)
    assert sum(p.numel() for p in models.GoogLeNet(auxiliary=True).sides.parameters()) == 6_379_984
    with torch.no_grad():
        assert [logits.shape for logits in net(x)] == [(2, 5)] * 3
        assert net.eval()(x).shape == (2, 5)


def hooks_of(model: nn.Module) -> int:
    modules = sum(
        len(module._forward_pre_hooks) + len(module._state_dict_pre_hooks)
        for module in model.modules()
    )
    return modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("lenet", 28),
        ("cifarnet", 32),
        pytest.param("googlenet", 64, marks=pytest.mark.slow),
        pytest.param("resnet50", 64, marks=pytest.mark.slow),
    ],
)
def test_networks_gossip(as_ranks: Ranks, store: Any, name: str, pixels: int) -> None:
    channels = models.MODELS[name].shape[0]

    def rank(number: int) -> tuple[list[float], float, int, int]:
        data = images.Synthetic((channels, pixels, pixels), 10, seed=number)
        model = models.MODELS[name].factory(10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        losses = []
        with (
            ug.join(number, 2, store, "shm", 50.0) as group,
            ug.attach(model, optimizer, group) as gossip,
        ):
            for step in range(2):
                pairs = [data[2 * step], data[2 * step + 1]]
                x, y = torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            during = hooks_of(model)
            apart = gossip.consensus_distance()
        return losses, apart, during, hooks_of(model)

    for result in as_ranks(2, rank):
        if isinstance(result, BaseException):
            raise result
        losses, apart, during, after = result
        assert all(map(math.isfinite, losses))
        assert 0 <= apart < 1e-5  # two ranks mix with each other in every step
        assert during > 0 == after


# --- data ------------------------------------------------------------------------------------


def test_synthetic_is_the_same_everywhere() -> None:
    here, there = images.load("synthetic", (1, 4, 4), 10), images.load("synthetic", (1, 4, 4), 10)
    assert here.validation is None and here.classes == 10
    for index in (0, 31, 32, 1000):
        assert torch.equal(here.train[index][0], there.train[index][0])
        assert here.train[index][0].shape == (1, 4, 4)
        assert 0 <= here.train[index][1] == there.train[index][1] < 10


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes as Python 2 and the NumPy of its day did: the form CIFAR-10 is published in."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, np.dtype):
            _, (name, *_), state = value.__reduce__()  # type: ignore[misc]
            return np.dtype, (name, 0, 1), state
        return NotImplemented

    def save_text(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {str: save_text, bytes: save_text}  # type: ignore[attr-defined]


def write_batch(path: Path, value: object) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Six batches of 4 images; image i of batch b is all 10 b + i, of class i."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data = np.zeros((4, 3072), np.uint8) + np.arange(4, dtype=np.uint8)[:, None] + 10 * number
        batch = {"data": data, "labels": [0, 1, 2, 3], "batch_label": name, "filenames": ["a.png"]}
        write_batch(folder / name, batch)
    return tmp_path


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10(cifar: Path, inner: str) -> None:
    data = images.load(f"cifar10:{cifar / inner}", (3, 32, 32), 10)
    assert (len(data.train), len(data.validation), data.classes) == (20, 4, 10)
    image, label = data.train[4 * 3 + 2]
    assert label == 2 and image.shape == (3, 32, 32)
    np.testing.assert_allclose(image[0], (32 / 255 - 0.4914) / 0.2470, rtol=1e-5)
    np.testing.assert_allclose(image[2], (32 / 255 - 0.4465) / 0.2616, rtol=1e-5)
    assert data.validation[1][1] == 1


class Harmful:
    def __reduce__(self) -> Any:
        return pytest.fail, ("the pickle was let run code",)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (Harmful(), "which is refused"),
        ([1, 2], "it wants 'data'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "it wants 'data'"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "it wants 'data'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "it wants 'data'"),
    ],
)
def test_cifar10_of_another_kind(cifar: Path, content: object, word: str) -> None:
    path = cifar / "cifar-10-batches-py" / "data_batch_3"
    write_batch(path, content)
    with pytest.raises(images.DataError, match=f"data_batch_3 is not a batch of.*{word}"):
        images.cifar10(cifar)


def test_cifar10_damaged_or_absent(cifar: Path) -> None:
    path = cifar / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(images.DataError, match="data_batch_2 is not a batch of"):
        images.cifar10(cifar)
    with pytest.raises(images.DataError, match="data_batch_1: No such file"):
        images.cifar10(cifar / "nowhere")


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Two classes, red (0) and green (1): three images of each to train on, one to validate."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 3), ("val", 1)):
        for name, colour in (("n01", (255, 0, 0)), ("n02", (0, 255, 0))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("not an image")
            for number in range(count):
                image.new("RGB", (40, 30 + number), colour).save(folder / f"{number}.png")
    return tmp_path


def test_imagenet(imagenet: Path) -> None:
    data = images.load(f"imagenet:{imagenet}", (3, 32, 32), 1000)
    assert (len(data.train), len(data.validation), data.classes) == (6, 2, 2)
    assert [label for _, label in data.train.files] == [0, 0, 0, 1, 1, 1]
    for image, label in (data.train[0], data.train[5], data.validation[1]):
        assert image.shape == (3, 32, 32)
        np.testing.assert_allclose(
            image[label], (1 - (0.485, 0.456)[label]) / (0.229, 0.224)[label]
        )
    grey = pytest.importorskip("PIL.Image").new("L", (9, 300), 255)  # too narrow for most cuts
    grey.save(imagenet / "train" / "n01" / "0.png")
    assert all(data.train[0][0].shape == (3, 32, 32) for _ in range(20))


def test_imagenet_cuts_stay_inside() -> None:
    for width, height in ((500, 375), (9, 300), (1, 1)):
        for _ in range(200):
            left, upper, right, lower = images._random_box(width, height)
            assert 0 <= left < right <= width and 0 <= upper < lower <= height
    assert images._central_box(256, 512) == (16, 144, 240, 368)


def test_imagenet_without_validation(imagenet: Path) -> None:
    (imagenet / "val").rename(imagenet / "later")
    assert images.imagenet(imagenet, 8).validation is None


def test_imagenet_of_another_kind(imagenet: Path) -> None:
    with pytest.raises(images.DataError, match="train: No such file"):
        images.imagenet(imagenet / "nowhere", 8)
    (imagenet / "train" / "n01" / "1.png").write_bytes(b"nothing of the kind")
    with pytest.raises(images.DataError, match=r"n01/1\.png"):
        images.imagenet(imagenet, 8).train[1]
    (imagenet / "val" / "n03").mkdir()
    with pytest.raises(images.DataError, match="n03: there is no such class"):
        images.imagenet(imagenet, 8)
    with pytest.raises(images.DataError, match="holds no image"):
        images.ImageFolder(imagenet, ["train", "val"], 8, random=False)


def test_imagenet_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(images.DataError, match="pip install pillow"):
        images.imagenet(tmp_path, 8)


@pytest.mark.parametrize(
    ("source", "shape", "word"),
    [
        ("mnist", (3, 32, 32), "choose synthetic"),
        ("cifar10:", (3, 32, 32), "choose synthetic"),
        ("synthetic:here", (3, 32, 32), "choose synthetic"),
        ("cifar10:here", (3, 224, 224), "3x32x32, the model takes 3x224x224"),
        ("imagenet:here", (1, 28, 28), "not 1x28x28"),
    ],
)
def test_data_that_do_not_fit(source: str, shape: tuple[int, int, int], word: str) -> None:
    with pytest.raises(images.DataError, match=word):
        images.load(source, shape, 10)


# --- the script ------------------------------------------------------------------------------


def torchrun(*arguments: str) -> str:
    """What two ranks of the script print."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *ranks, str(EXAMPLES / "train_images.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.spawn
def test_torchrun_job_on_synthetic() -> None:
    model = ("--model", "cifarnet", "--steps", "3", "--batch", "2")
    first, told, last, _ = torchrun(*model, "--epochs", "2", "--transport", "tcp").splitlines()
    assert first.startswith("epoch 1/2  loss 2.") and last.startswith("epoch 2/2  loss 2.")
    assert "accuracy" not in first and "images/s" in first and "apart" in first
    assert "3.5 MB sent in 6 rounds" in told  # weights and gradients of 145,578 parameters, thrice


@pytest.mark.spawn
def test_torchrun_job_on_cifar10(cifar: Path) -> None:
    data = ("--data", f"cifar10:{cifar}", "--batch", "3")
    printed = torchrun(*data, "--combine", "awc", "--mix", "weights")
    assert "epoch 1/1" in printed and "accuracy" in printed


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The script as a job of one rank in this process."""
    monkeypatch.setenv("COLUMNS", "100")  # for --help
    monkeypatch.setitem(sys.modules, "models", models)
    monkeypatch.setitem(sys.modules, "images", images)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return load("train_images").main  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--data", "cifar10:/nowhere"], "/nowhere/data_batch_1: No such file or directory"),
        (["--data", "CIFAR", "--batch", "99"], "--batch 99: each rank has 20 images only"),
        (["--data", "CIFAR", "--batch", "2", "--lr", "1e30"], "; try a smaller --lr"),
    ],
)
def test_failure_is_one_line(
    main: Callable[[list[str]], int],
    cifar: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    word: str,
) -> None:
    assert main([f"cifar10:{cifar}" if each == "CIFAR" else each for each in arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("train_images: ") and said.endswith(f"{word}\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["--help"], 0, "images a rank and step (default: 32)"),
        (["--lr", "-1"], 2, "-1 is not a finite number from 0"),
        (["--batch", "0"], 2, "0 is less than 1"),
        (["--model", "vgg"], 2, "invalid choice: 'vgg'"),
    ],
)
def test_command_line(
    main: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    word: str,
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == status
    assert word in "".join(capsys.readouterr())
