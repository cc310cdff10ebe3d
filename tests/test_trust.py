"""ucxgossip.trust: where a token comes from, who may read it, and what a seal lets through."""

import logging
import os
import pickle
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucxgossip import trust
from ucxgossip.errors import ArgumentError, RendezvousError, SignatureError, TokenError
from ucxgossip.trust import Seal, default_token_path, find_token, new_token

SECRET = "correct horse battery staple"
NAME = "ucxgossip/0/1/worker/0"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No token of this machine's user takes part."""
    for name in (trust.TOKEN, trust.TOKEN_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def written(path: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


# --- where a token comes from ------------------------------------------------------------------


def test_argument_variable_file_and_home_in_this_order(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home = find_token()
    monkeypatch.setenv(trust.TOKEN_FILE, str(written(home / "file", "from the file named\n")))
    assert find_token() == b"from the file named"
    monkeypatch.setenv(trust.TOKEN, "from the variable")
    assert find_token() == b"from the variable"
    assert find_token("from the argument") == find_token(b"from the argument")
    assert find_token("from the argument") == b"from the argument"
    assert at_home not in (b"from the file named", b"from the variable")


def test_first_use_makes_a_file_for_this_user_alone(home: Path) -> None:
    token = find_token()
    path = home / "config" / "ucxgossip" / "token"
    assert default_token_path() == path
    assert len(bytes.fromhex(token.decode())) == 32
    assert path.read_bytes() == token + b"\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["token"]
    assert find_token() == token


def test_without_xdg_the_home_directory(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HOME", str(home))
    for base in ("", "relative/config"):
        monkeypatch.setenv("XDG_CONFIG_HOME", base)
        assert default_token_path() == home / ".config" / "ucxgossip" / "token"


def test_many_first_uses_at_once_find_one_token(home: Path) -> None:
    code = "import sys; sys.stdin.read(); from ucxgossip.trust import find_token as f; print(f())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    try:
        for process in processes:  # all have started; now they go on together
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        tokens = {process.communicate(timeout=60)[0] for process in processes}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert tokens == {f"{find_token()}\n"}
    assert os.listdir(home / "config" / "ucxgossip") == ["token"]


def test_the_first_of_two_writers_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = default_token_path()
    link = os.link

    def late(source: str, target: Path) -> None:
        written(Path(target), "the other was first")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert find_token() == b"the other was first"
    assert os.listdir(path.parent) == ["token"]


def test_new_tokens_differ() -> None:
    assert len({new_token() for _ in range(10)}) == 10


# --- tokens that are refused -------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o601, 0o644, 0o777])
def test_file_that_others_may_use_is_refused(
    home: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(home / "file", mode=mode)
    monkeypatch.setenv(trust.TOKEN_FILE, str(path))
    with pytest.raises(TokenError, match=f"{path}, named by UCXGOSSIP_TOKEN_FILE, has mode 0"):
        find_token()
    path.chmod(0o400)
    assert find_token() == SECRET.encode()


def test_own_file_that_others_may_use_is_refused(home: Path) -> None:
    find_token()
    default_token_path().chmod(0o644)
    with pytest.raises(TokenError, match="mode 0644: others may know the token"):
        find_token()


def test_file_of_another_user_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.TOKEN_FILE, str(written(home / "file")))
    monkeypatch.setattr(os, "geteuid", lambda: (home / "file").stat().st_uid + 1)
    with pytest.raises(TokenError, match="belongs to user"):
        find_token()


def a_pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot be read"),
        (Path.mkdir, "no regular file"),
        (a_pipe, "no regular file"),
        (lambda path: written(path, ""), "has 0 bytes"),
        (lambda path: written(path, "x" * 15 + "\n"), "has 15 bytes"),
        (lambda path: written(path, "x" * 5000), "must have 16 to 4096"),
    ],
    ids=["missing", "directory", "pipe", "empty", "short", "long"],
)
def test_file_that_holds_no_token_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], said: str
) -> None:
    make(home / "file")
    monkeypatch.setenv(trust.TOKEN_FILE, str(home / "file"))
    with pytest.raises(TokenError, match=said):
        find_token()


@pytest.mark.parametrize("token", ["", "x" * 15, b"x" * 15, " " * 20, "x" * 5000, 12345, b"\n"])
def test_token_that_is_no_token_is_refused(token: object) -> None:
    with pytest.raises(TokenError) as raised:
        find_token(token)  # type: ignore[arg-type]
    assert isinstance(raised.value, ArgumentError)
    if isinstance(token, str | bytes):
        with pytest.raises(TokenError):
            Seal(token if isinstance(token, bytes) else token.encode())


@pytest.mark.parametrize("value", ["", "short"])
def test_variable_that_holds_no_token_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(trust.TOKEN, value)
    with pytest.raises(TokenError, match=f"UCXGOSSIP_TOKEN has {len(value)} bytes"):
        find_token()


def test_home_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(home / "config")  # a file where the directory would be
    with pytest.raises(TokenError, match=r"cannot be made: .*ucxgossip run"):
        find_token()
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody's home
    with pytest.raises(TokenError, match="no home directory"):
        find_token()


# --- seals -------------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8"), max_size=20)


@given(blob=st.binary(), name=names, job=st.binary(max_size=20))
def test_what_was_sealed_opens(blob: bytes, name: str, job: bytes) -> None:
    seal = Seal(SECRET.encode(), job)
    sealed = seal.seal(name, blob)
    assert len(sealed) == len(blob) + Seal.BYTES
    assert Seal(SECRET.encode()).of_job(job).open(name, sealed) == blob


@given(data=st.data(), blob=st.binary(max_size=64))
def test_a_changed_byte_does_not_open(data: st.DataObject, blob: bytes) -> None:
    seal = Seal(SECRET.encode())
    sealed = bytearray(seal.seal(NAME, blob))
    index = data.draw(st.integers(0, len(sealed) - 1))
    sealed[index] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SignatureError):
        seal.open(NAME, bytes(sealed))


@given(junk=st.binary(max_size=200))
def test_nothing_else_opens(junk: bytes) -> None:
    with pytest.raises(SignatureError):
        Seal(SECRET.encode()).open(NAME, junk)


def test_name_job_and_token_are_signed_too() -> None:
    seal = Seal(SECRET.encode(), b"job 1")
    sealed = seal.seal("a", b"bc")
    for other, name, blob in (
        (seal, "b", sealed),
        (Seal(SECRET.encode(), b"job 2"), "a", sealed),
        (Seal(SECRET.encode() + b"!", b"job 1"), "a", sealed),
        (seal, "ab", sealed[:32] + b"c"),  # the same bytes, cut elsewhere
        (Seal(SECRET.encode(), b"job 1a"), "", sealed),
        (seal, "a", sealed[:-1]),
        (seal, "a", sealed + b"\0"),
        (seal, "a", sealed[:31]),
        (seal, "a", b""),
    ):
        with pytest.raises(SignatureError):
            other.open(name, blob)


def test_signature_error_says_what_and_what_to_do() -> None:
    with pytest.raises(SignatureError, match=f"'{NAME}' is not signed.*ucxgossip run") as raised:
        Seal(SECRET.encode()).open(NAME, bytes(40))
    assert isinstance(raised.value, RendezvousError)


# --- the token appears nowhere -----------------------------------------------------------------


def test_token_is_in_no_message_and_no_repr(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    short = "sesame open"
    told: list[str] = []

    def provoke(action: Callable[[], object]) -> None:
        with pytest.raises((TokenError, SignatureError)) as raised:
            action()
        told.extend(traceback.format_exception(raised.value))
        told.append(repr(raised.value))

    provoke(lambda: find_token(short))
    provoke(lambda: Seal(short.encode()))
    provoke(lambda: Seal(SECRET.encode(), b"job").open(NAME, Seal(b"x" * 16).seal(NAME, b"blob")))
    monkeypatch.setenv(trust.TOKEN_FILE, str(written(home / "file", mode=0o644)))
    provoke(find_token)
    written(home / "file", short, mode=0o600)
    provoke(find_token)
    monkeypatch.setenv(trust.TOKEN, short)
    provoke(find_token)

    seal = Seal(SECRET.encode(), b"job")
    told += [repr(seal), str(seal), f"{seal}", repr(vars(seal)), repr(seal.of_job(b"other"))]
    with pytest.raises(TypeError):
        pickle.dumps(seal)
    told += [caplog.text, *capfd.readouterr()]
    for text in told:
        source = [line for line in text.splitlines() if "provoke(lambda" not in line]
        for secret in (SECRET, short, SECRET.encode().hex()):
            assert secret not in "\n".join(source)
