"""The compiled loop of `soak chunks`: rounds whose every element says where it comes from.

Ranks are stepped at random, and some are left alone for random times; each rank posts rounds of
random sizes and kinds, and checks what came. Everything about a round is a function of (seed,
number), so that sender and receiver agree on it, and each element one of (rank, round, position).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ucxgossip import jit
from ucxgossip.engine import drive, rounds
from ucxgossip.engine import words as w
from ucxgossip.engine.handlers import mailbox_words
from ucxgossip.ucp import ops

# --- a row: one rank that this process steps ---------------------------------------------------
RANK = 0
ENGINE = 1  # address of its engine's words
BOX = 2  # index of its mailbox
SOURCE = 3  # addresses of its payloads, `CANARY` bytes before and after each
TARGET = 4
PARAM = 5  # ucp_request_param_t of puts out of the source
NEXT = 6  # rounds ended
SILENT = 7  # passes for which it is not stepped
SPOILT = 8  # bytes of the source overwritten since they have left
FIELDS = 9

# --- the plan, equal on all ranks --------------------------------------------------------------
SEED = 0
RANKS = 1
AHEAD = 2  # as `Layout.ahead`
CHUNK = 3  # bytes
CAPACITY = 4  # bytes of the largest round
ROUNDS = 5
SHARED = 6  # 1: an engine thread drives beside this loop
PATIENCE = 7  # ns without the end of any round after which the rest counts as lost
PLAN = 8

# --- the tally ---------------------------------------------------------------------------------
CHUNKS = 0  # chunks that came
BYTES = 1
TORN = 2  # chunks of which some element is another's
DOUBLED = 3  # chunks that are whole, but another round's, or were mixed twice
CANARIES = 4  # payloads beside which a byte was overwritten
FAILED = 5  # a negative ucs_status_t
ENDED = 6  # rounds
TALLY = 7

CANARY = 64
_CANARY_WORD = 0x5C5C5C5C5C5C5C5C
_SMALL = 64


@jit.njit
def _hash(seed: int, number: int, salt: int) -> int:
    """31 bits that look random."""
    value = (number * 0x9E3779B1 + seed * 0x85EBCA77 + salt * 0x27D4EB2F) & 0x7FFFFFFF
    value ^= value >> 15
    value = (value * 0x2C1B3C6D) & 0x7FFFFFFF
    value ^= value >> 12
    value = (value * 0x297A2D39) & 0x7FFFFFFF
    return value ^ (value >> 15)


@jit.njit
def size_of(plan: Any, number: int) -> int:
    """Bytes of a round: any whole number of 8 up to the capacity, every eighth round small."""
    words = _hash(plan[SEED], number, 1)
    if _hash(plan[SEED], number, 2) % 8 == 0:
        return 8 * (1 + words % (_SMALL // 8))
    return 8 * (1 + words % (plan[CAPACITY] // 8))  # type: ignore[no-any-return]


@jit.njit
def rounds_for(plan: Any, chunks: int) -> int:
    """How many rounds, from the first on, it takes for at least so many chunks of one rank."""
    number = 0
    while chunks > 0:
        chunks -= (size_of(plan, number) + plan[CHUNK] - 1) // plan[CHUNK]
        number += 1
    return number


@jit.njit
def operation_of(plan: Any, number: int) -> int:
    """COPY (into another array) or a mix in place of either dtype."""
    return _hash(plan[SEED], number, 3) % 3


@jit.njit
def sender_of(plan: Any, rank: int, number: int) -> int:
    """Who puts to `rank`: the strides come at random, so that any two ranks may meet."""
    stride = 1 + _hash(plan[SEED], number, 4) % (plan[RANKS] - 1)
    return (rank - stride) % plan[RANKS]  # type: ignore[no-any-return]


@jit.njit
def to_of(plan: Any, rank: int, number: int) -> int:
    """Whom `rank` puts to."""
    stride = 1 + _hash(plan[SEED], number, 4) % (plan[RANKS] - 1)
    return (rank + stride) % plan[RANKS]  # type: ignore[no-any-return]


@jit.njit
def _value(rank: int, number: int, position: int) -> int:
    """Element `position` of a payload, exact as float64, with a bit to spare for a mean."""
    return (((number & 0x3FFFFFFF) * 16 + rank) << 16) + position


@jit.njit
def _small_value(rank: int, number: int, position: int) -> int:
    """The same for float32."""
    return (((number & 0xFF) * 8 + rank) << 12) + (position & 0xFFF)


@jit.njit
def fill(address: int, nbytes: int, operation: int, rank: int, number: int) -> None:
    """Write a payload, and canaries around it."""
    jit.view_words(address - CANARY, CANARY // 8)[:] = _CANARY_WORD
    jit.view_words(address + nbytes, CANARY // 8)[:] = _CANARY_WORD
    if operation == w.MIX_FLOAT32:
        narrow = jit.view_float32(address, nbytes // 4)
        for i in range(len(narrow)):
            narrow[i] = _small_value(rank, number, i)
    elif operation == w.MIX_FLOAT64:
        wide = jit.view_float64(address, nbytes // 8)
        for i in range(len(wide)):
            wide[i] = _value(rank, number, i)
    else:
        words = jit.view_words(address, nbytes // 8)
        for i in range(len(words)):
            words[i] = _value(rank, number, i)


@jit.njit
def _deviation(
    address: int, operation: int, position: int, rank: int, sender: int, number: int
) -> float:
    """What was received in place of the sender's element, less that element."""
    if operation == w.MIX_FLOAT32:
        own, due = _small_value(rank, number, position), _small_value(sender, number, position)
        found = float(jit.view_float32(address + 4 * position, 1)[0])
        return 2.0 * found - own - due
    due = _value(sender, number, position)
    if operation == w.MIX_FLOAT64:
        own = _value(rank, number, position)
        return 2.0 * jit.view_float64(address + 8 * position, 1)[0] - own - due  # type: ignore[no-any-return]
    return float(jit.view_words(address + 8 * position, 1)[0] - due)


@jit.njit
def check(
    tally: Any,
    chunk: int,
    address: int,
    nbytes: int,
    operation: int,
    rank: int,
    sender: int,
    number: int,
) -> None:
    """Compare every element of a round that ended with what it must be, and count.

    A chunk of another round deviates by the same in each element, and so does one that was mixed
    twice; where elements deviate by different amounts, it is torn.
    """
    width = 4 if operation == w.MIX_FLOAT32 else 8
    for start in range(0, nbytes, chunk):
        first, end = start // width, min(nbytes, start + chunk) // width
        deviation = _deviation(address, operation, first, rank, sender, number)
        same = True
        for position in range(first + 1, end):
            found = _deviation(address, operation, position, rank, sender, number)
            same = same and found == deviation
        if not same:
            tally[TORN] += 1
        elif deviation != 0.0:
            tally[DOUBLED] += 1
        tally[CHUNKS] += 1
    tally[BYTES] += nbytes


@jit.njit
def _canaries_alive(address: int, nbytes: int) -> bool:
    before = jit.view_words(address - CANARY, CANARY // 8)
    after = jit.view_words(address + nbytes, CANARY // 8)
    for i in range(CANARY // 8):
        if before[i] != _CANARY_WORD or after[i] != _CANARY_WORD:
            return False
    return True


@jit.njit
def _post(row: Any, plan: Any) -> None:
    """Write the next round's payload and start it."""
    number, rank = row[NEXT], row[RANK]
    nbytes, operation = size_of(plan, number), operation_of(plan, number)
    fill(row[SOURCE], nbytes, operation, rank, number)
    target = row[SOURCE]
    if operation == w.COPY:
        target = row[TARGET]
        fill(target, nbytes, operation, 15, number)
    row[SPOILT] = 0 if operation == w.COPY else nbytes
    sender = sender_of(plan, rank, number)
    rounds.post(
        jit.view_words(row[ENGINE], w.ENGINE_WORDS),
        row[BOX],
        number,
        row[SOURCE],
        target,
        nbytes,
        to_of(plan, rank, number),
        sender,
        operation,
        0.5,
        row[PARAM],
        0,
        sender_of(plan, rank, number + plan[AHEAD]),
        1,
        0,
        0,
    )


@jit.njit
def _take(row: Any, plan: Any, tally: Any) -> None:
    """Check the round that has ended."""
    number, rank = row[NEXT], row[RANK]
    nbytes, operation = size_of(plan, number), operation_of(plan, number)
    target = row[TARGET] if operation == w.COPY else row[SOURCE]
    sender = sender_of(plan, rank, number)
    check(tally, plan[CHUNK], target, nbytes, operation, rank, sender, number)
    if not _canaries_alive(target, nbytes) or not _canaries_alive(row[SOURCE], nbytes):
        tally[CANARIES] += 1
    row[NEXT] = number + 1
    tally[ENDED] += 1


@jit.njit
def _spoil(row: Any, mailbox: Any) -> None:
    """Overwrite what the engine says has left its source: a put that still reads it would tell."""
    free = min(mailbox[w.SENT] * mailbox[w.CHUNK], mailbox[w.NBYTES])
    if row[SPOILT] < free:
        words = jit.view_words(row[SOURCE] + row[SPOILT], (free - row[SPOILT]) // 8)
        words[:] = -1
        row[SPOILT] = free


@jit.njit
def _drive(engine: Any, mailbox: Any, shared: bool) -> None:
    """One step: mostly a whole pass of the engine, at times only a part of one."""
    if shared:
        if drive.acquire(engine, jit.now_ns() + 1_000_000_000):
            drive.drive_once(engine)
            drive.release(engine)
        return
    part = np.random.randint(0, 8)
    if part == 0:
        ops.progress(engine[w.WORKER])
    elif part <= 2 and jit.load_acquire(mailbox, w.STATE) == w.ACTIVE:
        rounds.advance(engine, mailbox, part == 1 and rounds.may_put(engine, mailbox))
    else:
        drive.drive_once(engine)


@jit.njit
def _step(row: Any, plan: Any, tally: Any) -> None:
    """Let one rank do something."""
    engine = jit.view_words(row[ENGINE], w.ENGINE_WORDS)
    mailbox = mailbox_words(engine, row[BOX])
    state = jit.load_acquire(mailbox, w.STATE)
    if state == w.FAILED:
        tally[FAILED] = mailbox[w.FAILURE]
    elif state == w.DONE and mailbox[w.ROUND] == row[NEXT]:
        _take(row, plan, tally)
    if state != w.ACTIVE and row[NEXT] < plan[ROUNDS]:
        _post(row, plan)
    _drive(engine, mailbox, plan[SHARED] == 1)
    if row[NEXT] < plan[ROUNDS]:
        _spoil(row, mailbox)


@jit.njit
def soak(rows: Any, plan: Any, tally: Any, seed: int) -> bool:
    """Step the ranks of `rows` at random until each has ended all rounds.

    False when no round ended for the plan's patience, or one failed. seed: of the order of steps.
    """
    np.random.seed(seed)
    quiet_since, ended = jit.now_ns(), tally[ENDED]
    passes = 0
    due = ended + len(rows) * plan[ROUNDS]
    while tally[ENDED] < due and tally[FAILED] == 0:
        passes += 1
        row = rows[np.random.randint(0, len(rows))]
        if row[SILENT] > 0:
            row[SILENT] -= 1
            if plan[SHARED] == 1:
                jit.yield_cpu()
            continue
        _step(row, plan, tally)
        if np.random.randint(0, 32) == 0:
            row[SILENT] = np.random.randint(0, 1 << np.random.randint(1, 10))
        if passes % 4096 == 0:
            now = jit.now_ns()
            if tally[ENDED] > ended:
                quiet_since, ended = now, tally[ENDED]
            elif now - quiet_since > plan[PATIENCE]:
                return False
    return tally[FAILED] == 0  # type: ignore[no-any-return]
