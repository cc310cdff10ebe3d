"""bench.kernels: rows out of times; results are checked; the command measures what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ucxgossip.bench import kernels
from ucxgossip.cli import main
from ucxgossip.errors import ArgumentError, BenchError, MissingExtraError

KEYS = {
    "bench", "device", "backend", "dst", "src", "bytes", "threads", "us", "spread_percent", "GBps",
    "bound_GBps", "fraction", "speedup",
}  # fmt: skip


def test_rows_count_what_has_to_move() -> None:
    """4000 bytes of float32 and a payload of 2000: 10,000 bytes; the triad moves 12,000."""
    found = {"bound": [2e-6, 2e-6, 4e-6], "numba": [1e-6, 2e-6, 3e-6], "add_mul": [3e-6] * 3}
    triad, numba, add_mul = kernels.make_rows(found, "cpu", ("float32", "bfloat16"), 4000, 2)
    assert set(numba) == KEYS
    assert [row["backend"] for row in (triad, numba, add_mul)] == ["triad", "numba", "add_mul"]
    assert triad["GBps"] == triad["bound_GBps"] == numba["bound_GBps"] == pytest.approx(6.0)
    assert (triad["fraction"], triad["speedup"]) == (1.0, None)
    assert (numba["us"], numba["GBps"]) == pytest.approx((2.0, 5.0))
    # Repeat by repeat: 10/6, 5/6 and 3.33/3 of the bound; 3, 1.5 and 1 times add_mul.
    assert (numba["fraction"], numba["speedup"]) == pytest.approx((10 / 9, 1.5))
    assert add_mul["speedup"] == 1.0


def test_a_copy_moves_each_byte_twice() -> None:
    (row,) = kernels.make_rows({"bound": [1e-6]}, "cuda", ("float32", "float32"), 4000, None)
    assert (row["backend"], row["GBps"], row["threads"]) == ("copy", pytest.approx(8.0), None)


def test_each_figure_takes_a_while() -> None:
    counts: list[int] = []

    def timed(call: Any, count: int) -> float:
        counts.append(count)
        return 1e-4 * count

    found = kernels.measure([kernels.Entrant("one", lambda: None)], None, 3, timed)
    assert counts == [1, 1, 1, 30, 30, 30]
    assert found == {"one": pytest.approx([1e-4] * 3)}


def test_a_wrong_result_is_not_timed() -> None:
    dst, src = torch.zeros(3000), torch.ones(3000)

    def forgets_the_end() -> None:
        dst[:-1] = 0.5

    with pytest.raises(BenchError, match="late did not leave the mean"):
        kernels.check(kernels.Entrant("late", forgets_the_end), dst, src)
    dst.zero_()
    kernels.check(kernels.Entrant("right", lambda: dst.lerp_(src, 0.5)), dst, src)


def test_pairs() -> None:
    assert kernels.parse_pairs("float32/bfloat16, float16") == [
        ("float32", "bfloat16"),
        ("float16", "float16"),
    ]
    for bad in ("int8", "bfloat16/float32", ""):
        with pytest.raises(ArgumentError, match="float32/bfloat16"):
            kernels.parse_pairs(bad)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"device": "tpu"}, "device"),
        ({"sizes": [10]}, "float32"),
        ({"threads": [0]}, "threads"),
        ({"repeats": 0}, "repeats"),
    ],
    ids=str,
)
def test_bad_arguments_measure_nothing(
    changed: dict[str, Any], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArgumentError, match=word):
        kernels.run(**changed)
    assert capsys.readouterr().out == ""


def test_command(tmp_path: Path) -> None:
    path, before = tmp_path / "rows.json", torch.get_num_threads()
    command = ["bench", "kernels", "--sizes", "64K", "--threads", "1,2", "--repeats", "2"]
    assert main([*command, "--json", str(path)]) == 0
    assert torch.get_num_threads() == before
    rows = json.loads(path.read_text())["rows"]
    assert all(set(row) == KEYS and row["bench"] == "kernels" for row in rows)
    seen = {(row["dst"], row["src"], row["threads"], row["backend"]) for row in rows}
    wanted = {
        (*pair, threads, backend)
        for pair in kernels.PAIRS
        for threads in (1, 2)
        for backend in ("triad", "numba", "add_mul", "lerp")
    } | {("float32", "float32", threads, "axpy") for threads in (1, 2)}
    assert seen == wanted and len(rows) == len(wanted)
    for row in rows:
        assert row["bytes"] == 65536 and row["us"] > 0
        assert row["fraction"] > 0 and row["GBps"] > 0


def test_cuda_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing(*arguments: object) -> None:
        raise MissingExtraError("pip install 'ucxgossip[cu12]'")

    monkeypatch.setattr("ucxgossip.bench.kernels_cuda.select", missing)
    path = tmp_path / "rows.json"
    assert main(["bench", "kernels", "--device", "cuda", "--json", str(path)]) == 2
    printed = capsys.readouterr()
    assert "MissingExtraError: pip install 'ucxgossip[cu12]'" in printed.err
    assert printed.out == "" and not path.exists()


@pytest.mark.gpu
def test_command_on_cuda(tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    path = tmp_path / "rows.json"
    command = ["bench", "kernels", "--device", "cuda", "--sizes", "1M", "--repeats", "2"]
    if main([*command, "--json", str(path)]) == 2:
        pytest.skip("no CUDA device")
    rows = json.loads(path.read_text())["rows"]
    assert {"copy", "cupy"} <= {row["backend"] for row in rows}
    assert all(set(row) == KEYS for row in rows)
