"""How ranks meet: each greets, rank 0 answers all, and the job has a number of its own.

A token serves many jobs, so a note that was signed with it in an earlier one could be put into
the store again, and lead a rank to an address where somebody else listens now. Therefore each
greeting brings a challenge, drawn afresh, and rank 0 answers with the challenges of all ranks and
the job's number, drawn afresh too; what is signed with token and number was signed in this job.
Rejected: a number that rank 0 just publishes, since an old one, with all that was signed with it,
would be taken by every rank but rank 0.

Greetings stand in the order in which ranks came. So whoever comes with another token, or another
number of ranks, is noticed at once: rank 0 reads every greeting, and the others read the first
one, since rank 0 may never come.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Container

from ucxgossip.board import Board, not_understood, parsed
from ucxgossip.errors import MismatchError, SignatureError

NONCE = 16
"""Bytes of a challenge and of the job's number."""

_WHAT = "to join"


def greet(board: Board) -> bytes:
    """The job's number, once all ranks have come. Collective.

    Raises `SignatureError` where tokens differ and `MismatchError` where ranks differ in the
    number of ranks, on all who have come; `RankMissingError` at the deadline.
    """
    challenge = secrets.token_bytes(NONCE)
    number = board.store.add(board.key("arrivals"), 1)
    greeting = json.dumps([board.size, challenge.hex()]).encode()
    board.write(board.seal, board.key("arrival", number), greeting)
    return _host(board) if board.rank == 0 else _guest(board, number, challenge)


def _host(board: Board) -> bytes:
    """Rank 0: answer all ranks, in whatever order they come."""
    challenges: dict[int, bytes] = {}
    unread: list[int] = []
    known = 0

    def look() -> bool:
        """Read every greeting that is there; whether all are."""
        nonlocal known
        came = board.store.add(board.key("arrivals"), 0)
        unread.extend(range(known + 1, came + 1))
        known = max(known, came)
        for number in list(unread):
            if board.store.check([board.key("arrival", number)]):
                unread.remove(number)
                rank, challenges[rank] = _read(board, number)
        return len(challenges) == board.size

    while not look():
        # A rank that died before it wrote its greeting leaves a gap, which `look` passes over.
        following = board.key("arrival", unread[0] if unread else known + 1)
        board.wait(following, lambda: _without(challenges, board.size), _WHAT, look)
    number = secrets.token_bytes(NONCE)
    answer = number + b"".join(challenges[rank] for rank in range(board.size))
    board.write(board.seal, board.key("job"), answer)
    return number


def _guest(board: Board, number: int, challenge: bytes) -> bytes:
    """Another rank: wait for rank 0's answer. `number`: as how many-th this rank came."""
    compared = number == 1

    def compare() -> bool:
        nonlocal compared
        if not compared and board.store.check([board.key("arrival", 1)]):
            _read(board, 1)
            compared = True
        return False

    compare()
    board.wait(board.key("job"), lambda: _missing(board), _WHAT, compare)
    _, answer = board.read(board.seal, board.key("job"))
    size, rest = divmod(len(answer) - NONCE, NONCE)
    if size < 1 or rest:
        raise not_understood(0)
    if size != board.size:
        board.declare(_other_size(0, size, board.rank, board.size))
    start = NONCE * (board.rank + 1)
    if answer[start : start + NONCE] != challenge:
        board.declare(
            SignatureError(
                f"rank {board.rank} got rank 0's answer to a greeting of an earlier job: somebody "
                "else writes to the job's store"
            )
        )
    return answer[:NONCE]


def _read(board: Board, number: int) -> tuple[int, bytes]:
    """Rank and challenge of the `number`-th who came, if it fits the job that this rank is in."""
    try:
        rank, blob = board.read(board.seal, board.key("arrival", number))
    except SignatureError as error:
        board.declare(error)
    size, text = parsed(blob, rank, int, str)
    if size != board.size:
        first, second = sorted([(rank, size), (board.rank, board.size)])
        board.declare(_other_size(*first, *second))
    try:
        challenge = bytes.fromhex(text)
    except ValueError:
        challenge = b""
    if len(challenge) != NONCE:
        raise not_understood(rank)
    return rank, challenge


def _missing(board: Board) -> tuple[int, ...]:
    """Ranks that have not come; rank 0, who did not answer, where all have."""
    came = range(1, board.store.add(board.key("arrivals"), 0) + 1)
    here = [n for n in came if board.store.check([board.key("arrival", n)])]
    return _without({_read(board, number)[0] for number in here}, board.size) or (0,)


def _without(here: Container[int], size: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(size) if rank not in here)


def _other_size(rank: int, size: int, other: int, others: int) -> MismatchError:
    return MismatchError(f"join: world size: rank {rank} has {size}, rank {other} has {others}")
