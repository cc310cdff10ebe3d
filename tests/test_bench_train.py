"""bench.train: real ranks end with the weights of the simulation; the command says what it did."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucxgossip.bench import tasks, train, train_report
from ucxgossip.bench.methods import parse
from ucxgossip.bench.setting import Outcome, Setting
from ucxgossip.bench.simulate import simulate
from ucxgossip.bench.train_plan import Run
from ucxgossip.cli import main
from ucxgossip.errors import BenchError

pytest.importorskip("sklearn")

KEYS = {
    "bench", "model", "ranks", "method", "accuracy", "worst_accuracy", "consensus", "step_ms",
    "efficiency", "optimizer", "shards", "decay", "rate", "seeds", "accuracy_std", "worst_std",
    "loss", "simulated",
}  # fmt: skip

SERVED = (
    "local",
    "lockstep",
    "allreduce",
    "gossip-both-atc",
    "gossip-both-awc",
    "gossip-weights-atc",
    "gossip-weights-awc",
    "gossip-gradients",
    "gossip-both-atc+state+bucket1",
    "gossip-both-awc+state",
    "gossip-weights-atc+stale1",
    "gossip-weights-atc+local2",
    "gossip-both-atc+global4",
    "gossip-both-atc+state+noise",
)
"""What `attach` serves and timing does not change."""


@pytest.mark.slow
@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("ranks", [3])
def test_real_ranks_equal_the_simulation(ranks: int, tmp_path: Path) -> None:
    setting = Setting(
        ranks, shards="skewed", decay="cosine", steps=6, batch=4, seed=3, evaluations=2
    )
    runs = [
        Run(
            parse(method),
            replace(setting, optimizer=optimizer, rate=rate),
        )
        for method in SERVED
        for optimizer, rate in (("sgd", 0.01), ("adamw", 0.001))
        if optimizer == "adamw" or "noise" not in method
    ]
    found = train.real("lenet", runs, "auto", weights=str(tmp_path))
    task = tasks.load("lenet")
    for number, (run, outcome) in enumerate(zip(runs, found, strict=True)):
        expected = simulate(task, run.method, run.setting)
        said = f"{run.method.name}, {run.setting.optimizer}"
        weights = np.load(tmp_path / f"{number}.npy")
        np.testing.assert_allclose(weights, expected.weights, atol=1e-5, err_msg=said)
        assert outcome.steps == expected.steps
        np.testing.assert_allclose(outcome.losses, expected.losses, rtol=1e-3, err_msg=said)
        np.testing.assert_allclose(outcome.consensus, expected.consensus, atol=1e-5, err_msg=said)
        assert outcome.step_ms is not None and outcome.step_ms > 0


def rows(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text())
    assert document["environment"]["torch"]
    found: list[dict[str, Any]] = document["rows"]
    for row in found:
        assert set(row) >= KEYS
    return found


@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
def test_real_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.json"
    command = ["bench", "train", "--ranks", "2", "--steps", "4", "--batch", "4", "--seeds", "1"]
    assert main([*command, "--methods", "local,gossip-both-atc", "--json", str(path)]) == 0
    local, gossip = rows(path)
    assert local["efficiency"] == 1
    assert gossip["efficiency"] == pytest.approx(local["step_ms"] / gossip["step_ms"])
    assert gossip["simulated"] is False and gossip["accuracy_std"] is None
    assert "gossip-both-atc" in capsys.readouterr().out


def test_simulated_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, figure = tmp_path / "train.json", tmp_path / "train.png"
    command = ["bench", "train", "--simulate", "--ranks", "2,4", "--seeds", "2", "--steps", "20"]
    options = ["--methods", "allreduce,gossip-both-atc+state", "--rates", "0.02,1e9"]
    files = ["--json", str(path), "--plot", str(figure)]
    assert main([*command, *options, *files]) == 0
    found = rows(path)
    assert [(row["ranks"], row["method"]) for row in found] == [
        (2, "allreduce"),
        (2, "gossip-both-atc+state"),
        (4, "allreduce"),
        (4, "gossip-both-atc+state"),
    ]
    for row in found:
        assert row["rate"] == 0.02  # the other diverges
        assert row["step_ms"] is row["efficiency"] is None
        assert row["simulated"] is True
        assert row["worst_accuracy"] <= row["accuracy"] <= 100
        assert row["curve"]["steps"][-1] == 20
    assert figure.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert said.out.count("gossip-both-atc+state") == 2 and said.err == ""


def test_diverged_runs_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    command = ["bench", "train", "--simulate", "--ranks", "2", "--seeds", "1", "--steps", "20"]
    assert main([*command, "--rate", "1e9", "--methods", "local", "--json", str(path)]) == 0
    (row,) = rows(path)
    assert row["consensus"] is None and row["loss"] is None
    assert 0 <= row["accuracy"] < 50


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (
            ["--methods", "mpi"],
            "unknown method 'mpi'; choose of local, lockstep, allreduce",
        ),
        (["--methods", ""], "at least one method"),
        (["--methods", "local,local"], "none twice"),
        (["--methods", "gossip-deferred"], "add --simulate"),
        (
            ["--model", "vgg"],
            "unknown model 'vgg'; choose one of lenet, convnet, resnet20, resnet50, gpt",
        ),
        (["--optimizer", "lion"], "choose one of sgd, adamw"),
        (["--shards", "even"], "choose one of iid, skewed"),
        (["--decay", "step"], "choose one of constant, cosine"),
        (["--ranks", "two"], "--ranks 'two'"),
        (["--ranks", "0"], "no job of 0 ranks"),
        (["--ranks", "4,4"], "none twice"),
        (["--rates", "fast"], "--rates 'fast'"),
        (["--rate", "-1"], "positive"),
        (["--steps", "0"], "steps is 0"),
        (["--seeds", "0"], "seeds is 0"),
        (["--ranks", "500"], "fewer than a batch"),
        (["--transport", "pigeon"], "unknown transport"),
        (["--plot", "/nowhere/at/all.png"], "no such folder"),
    ],
)
def test_bad_input(
    options: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "never.json"
    assert main(["bench", "train", *options, "--json", str(path)]) == 2
    assert word in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
def test_a_rank_that_fails_is_named() -> None:
    runs = [Run(parse("gossip-deferred"), Setting(2, steps=1))]
    with pytest.raises(BenchError, match="has no real form"):
        train.real("lenet", runs, "auto")


def outcome(worst: float, loss: float, consensus: float = 0.1, step_ms: float = 2.0) -> Outcome:
    return Outcome([1], [[worst, 90.0]], [[loss, 1.0]], [consensus], step_ms=step_ms)


def test_rows_are_means_over_seeds() -> None:
    setting = Setting(2)
    seeds = [outcome(80, 2.0, step_ms=1.0), outcome(70, 4.0, step_ms=3.0)]
    row = train_report.make_row("lenet", "local", setting, seeds, simulated=False)
    assert row["accuracy"] == pytest.approx((85 + 80) / 2)
    assert row["worst_accuracy"] == pytest.approx(75)
    assert row["worst_std"] == pytest.approx(50**0.5)
    assert row["loss"] == pytest.approx(2.0) and row["worst_loss"] == pytest.approx(3.0)
    assert row["step_ms"] == 2.0


def test_best_rate() -> None:
    tried = [
        train_report.make_row("lenet", "m", Setting(2, rate=rate), [outcome(worst, loss)], True)
        for rate, worst, loss in ((0.1, 80, 3.0), (0.2, 85, float("nan")), (0.3, 70, 2.0))
    ]
    assert train_report.best(tried, by_loss=False)["rate"] == 0.2
    assert train_report.best(tried, by_loss=True)["rate"] == 0.3
