"""The token that the ranks of a job share, and the seal that proves who wrote what in their store.

libucp believes every byte of a worker address and of a remote key, and the store that they travel
through believes everyone. So whatever one rank reads of another is signed, with HMAC-SHA256 and a
token that only the job has, and opened before anything else looks at it. docs/security.md tells
what this protects and what not.

The token is looked for where a launcher puts it, and else in a file of this user that the first
process makes, as Erlang does with its cookie: one host, or hosts with a shared home, need no
setting. Rejected: a token made by rank 0 and handed out through the store (whoever reaches the
store would read it); TLS (the store's client has none, and UCX would still not ask who puts);
signatures with a key pair a rank (the keys would have to be handed out as the token is).
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
import struct
import tempfile
from pathlib import Path

from ucxgossip.errors import SignatureError, TokenError

TOKEN = "UCXGOSSIP_TOKEN"
TOKEN_FILE = "UCXGOSSIP_TOKEN_FILE"
MIN_TOKEN = 16
"""Bytes of the shortest token that is taken."""
MAX_TOKEN = 4096
"""Bytes of the longest one."""

_LENGTHS = struct.Struct("<QQQ")
_DOMAIN = b"ucxgossip seal 1"
ADVICE = (
    f"Give every rank the same token: `ucxgossip run` makes one for a host, `ucxgossip token` "
    f"prints one for {TOKEN}, or for a file that only you may read, named by {TOKEN_FILE}"
)


def new_token() -> str:
    """A fresh token: 32 random bytes, in hexadecimal."""
    return secrets.token_hex(32)


def default_token_path() -> Path:
    """``$XDG_CONFIG_HOME/ucxgossip/token``, or ``~/.config/ucxgossip/token``."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification says to ignore a relative one.
    try:
        root = Path(base) if base.startswith("/") else Path("~/.config").expanduser()
    except RuntimeError as error:  # no HOME, and the user is in no list
        raise TokenError(f"there is no home directory for a token: {error}. {ADVICE}") from None
    return root / "ucxgossip" / "token"


def find_token(token: str | bytes | None = None) -> bytes:
    """The job's token: the argument, else UCXGOSSIP_TOKEN, else a file's content.

    The file is the one that UCXGOSSIP_TOKEN_FILE names, else `default_token_path`, which is made
    with a new token where it is not there. White space at the ends does not count. Raises
    `TokenError` for a token of fewer than MIN_TOKEN bytes, and for a file that cannot be read,
    that belongs to another user, or that group or others may read or write.
    """
    if token is not None:
        if not isinstance(token, str | bytes):
            raise TokenError(f"the token is of type {type(token).__name__}; pass str or bytes")
        return _checked(token, "the token given")
    if TOKEN in os.environ:
        return _checked(os.environb[TOKEN.encode()], f"the token of {TOKEN}")
    if TOKEN_FILE in os.environ:
        return _read(Path(os.environ[TOKEN_FILE]), f", named by {TOKEN_FILE},")
    path = default_token_path()
    if not os.path.lexists(path):
        _make(path)
    return _read(path)


def _checked(token: str | bytes, what: str) -> bytes:
    found = (token.encode() if isinstance(token, str) else token).strip()
    if not MIN_TOKEN <= len(found) <= MAX_TOKEN:
        raise TokenError(
            f"{what} has {len(found)} bytes; must have {MIN_TOKEN} to {MAX_TOKEN}. {ADVICE}"
        )
    return found


def _read(path: Path, why: str = "") -> bytes:
    """The token in the file at `path`, if only this user can have written and read it."""
    try:
        # Not blocking: a named pipe would be waited for, and is no regular file below.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise TokenError(f"the token file {path}{why} cannot be read: {error}. {ADVICE}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise TokenError(f"the token file {path}{why} is no regular file. {ADVICE}")
        if found.st_uid != os.geteuid():
            raise TokenError(
                f"the token file {path}{why} belongs to user {found.st_uid}, and this process runs "
                f"as {os.geteuid()}. {ADVICE}"
            )
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise TokenError(
                f"the token file {path}{why} has mode {stat.S_IMODE(found.st_mode):04o}: others "
                f"may know the token. Make a new one (`ucxgossip token`) and chmod 600 the file"
            )
        return _checked(os.read(descriptor, MAX_TOKEN + 1), f"the token in {path}{why}")
    finally:
        os.close(descriptor)


def _make(path: Path) -> None:
    """Write a new token to `path`; of several processes that do so at once, the first one wins."""
    temporary = ""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".token-", dir=path.parent)  # mode 0600
        with open(descriptor, "w") as file:
            file.write(new_token() + "\n")
            file.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename, it never replaces another's
    except (OSError, ValueError) as error:
        raise TokenError(f"the token file {path} cannot be made: {error}. {ADVICE}") from None
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


class Seal:
    """Signs blobs, and opens those that somebody with the same token signed for the same job.

    job: what tells this job from others with the same token. A blob is signed together with its
    `name`, so that it cannot stand in another's place; who is to tell one writer or one time from
    another puts them into the name. The token itself is not kept, only the state of the HMAC.
    """

    BYTES = 32
    """By how much a sealed blob is longer."""

    def __init__(self, token: bytes, job: bytes = b"") -> None:
        self._keyed = hmac.new(_checked(token, "the token given"), digestmod="sha256")
        self._job = bytes(job)

    def __repr__(self) -> str:
        return f"<Seal of job {self._job.hex() or '(none)'}>"

    @property
    def job(self) -> bytes:
        """What tells this job from others."""
        return self._job

    def of_job(self, job: bytes) -> Seal:
        """The seal of the same token for another job."""
        seal = object.__new__(Seal)
        seal._keyed, seal._job = self._keyed, bytes(job)
        return seal

    def _tag(self, name: str, blob: bytes) -> bytes:
        tag, encoded = self._keyed.copy(), name.encode()
        tag.update(_DOMAIN + _LENGTHS.pack(len(self._job), len(encoded), len(blob)))
        for part in (self._job, encoded, blob):
            tag.update(part)
        return tag.digest()

    def seal(self, name: str, blob: bytes) -> bytes:
        """`blob` behind its signature, BYTES longer."""
        return self._tag(name, blob) + blob

    def open(self, name: str, sealed: bytes) -> bytes:
        """The blob that was sealed as `name`; `SignatureError` for anything else."""
        blob = sealed[self.BYTES :]
        if not hmac.compare_digest(self._tag(name, blob), sealed[: self.BYTES]):
            raise SignatureError(
                f"{name!r} is not signed with this job's token: the ranks have different tokens, "
                f"or somebody else writes to their store. {ADVICE}"
            )
        return blob
