"""One round whose source and target lie on a device, moved by staging: never waits, as `rounds`.

What travels is what travels between hosts: chunks are copied from the device into pinned staging
memory and put from there into the partner's slot, which is host memory; a chunk that has arrived is
copied from its slot to the device and mixed there. So credits, signals, checksums and members are
those of `rounds`, and a partner need not know what this rank computes on.

The device does its work on two streams of ours, and tells by events when it is done. In order:

1. The source's event must have completed: what the training stream had to do before the round.
2. Chunks leave: copy to staging places, event; when that has completed, they are put. A place is
   free again when its put is (`SENT`).
3. Chunks come in: signal, and in place their own copies have left the device; then copy from the
   slots, kernels, event. When that has completed they count as `MIXED`, and their slots' credit may
   go. With a target event (rounds that were held) the stream waits for it first. Chunks come to
   few places, which the stream's order gives free, but what is enqueued has events of its own, up
   to `MOST_IN_FLIGHT`: or no round behind work that ends late could be enqueued before it has
   ended.
4. All are enqueued: the done event is recorded, and the round is `LAUNCHED`. A stream that waits
   for that event sees the whole target; no host has to.
5. Distances and what was left out come to the host behind that, with an event of their own. Then
   the round ends.

Where the partner is a process of this host that could map its slots on its device (`Staging`), a
chunk is copied straight into those, and nothing is staged: that needs the slot's credit before the
copy, the signal goes once the copy has completed, and says with `ON_DEVICE` where the chunk is. The
copy's event is what orders the two; no fence is needed. Small rounds over a network, which go as
one message, are staged all the same.

Each call of the driver costs the driving thread some microseconds, and the thread that trains
wants the driver too. So the calls are for a *run* of chunks: as many as have come and lie side by
side in slots, places and target. Its kernels have a row of blocks for each chunk, which stays the
unit of integrity. In a held round all has mostly come when it may mix.

So the host waits until this rank's chunks have left, once the device has done what came before the
post, and the partner's have come and are enqueued. Waits on the stream itself for either, on a word
in pinned memory (``cuStreamWaitValue32``), would let it go on, and are not built: a partner that
dies would hang the stream, and whoever waits for it, for ever, unless its word is written.

Untested on hardware: proved on a device whose events complete late (tests/test_device_rounds.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ucxgossip import jit
from ucxgossip.device import table as t
from ucxgossip.engine import credits, rounds, sending
from ucxgossip.engine import words as w
from ucxgossip.engine.checks import intact
from ucxgossip.engine.handlers import (
    mailbox_floats,
    mailbox_words,
    place_of,
    place_offset,
    position,
    signal_words,
    word_of,
)
from ucxgossip.kernels.cpu import CAME_IN, OWN
from ucxgossip.ucp import ops

# --- words of a mailbox's device side: fixed ---------------------------------------------------
TABLE = 0  # address of the device's table
OUT = 1  # address of the pinned staging places that chunks are put from
OUT_PLACES = 2
OUT_PARAM = 3  # ucp_request_param_t of puts from there
OUT_EVENTS = 4  # address of (event, chunks that have left then) of runs, one for each place
IN = 5  # device address of the places that chunks are copied to
IN_PLACES = 6
IN_EVENTS = 7  # address of (event, chunks that are mixed then) of runs
RESULTS = 8  # device address of two words a chunk: squared distance, bits of what was not finite
RESULTS_HERE = 9  # pinned host address where they come to
ZEROS = 10  # pinned host address of as many zeros
DONE_EVENT = 11  # the target is whole
END_EVENT = 12  # the results are here
IN_EVENTS_COUNT = 13  # one for each chunk, as far as MOST_IN_FLIGHT goes

# --- of the round under way --------------------------------------------------------------------
SOURCE_EVENT = 14  # what must complete before the source may be read; 0: nothing
TARGET_EVENT = 15  # what the mix must come after, beyond that; 0: nothing
ROUND_TURN = 16  # the mailbox's TURN of the round that the words below are about
SOURCE = 17  # device address
PHASE = 18
COPIED = 19  # chunks whose copy to staging memory is enqueued
LEFT = 20  # chunks whose copy has completed
ENQUEUED = 21  # chunks whose mix is enqueued
SLOTS_HERE = 22  # device address of this rank's slots there; 0: nobody may put to them
WAYS = 23  # address of: where this process sees other ranks' slots on their devices, or 0
WAY = 24  # the partner's of this round
MODE = 25  # the capture mode of the thread that drives, meanwhile
OUT_RUNS = 26  # runs whose copy is enqueued
OUT_SEEN = 27  # of those that have completed
IN_RUNS = 28  # runs whose mix is enqueued
IN_SEEN = 29  # of those that have completed
WAY_RUN = 30  # chunks that are copied at a time to another device
MOST = 31  # what may wait on the device, of all rounds: `MOST_IN_FLIGHT`
ARGUMENTS = 32  # of a kernel: six values, then their six addresses
WORDS = 44

# --- where a chunk waits to be mixed ------------------------------------------------------------
NOWHERE, IN_HOST, IN_DEVICE = 0, 1, 2

# --- values of PHASE ---------------------------------------------------------------------------
WAITING = 0  # for the source's event
MOVING = 1
LAUNCHED = 2  # the done event is recorded
ENDED = 3

VALUES = 6

MOST_IN_FLIGHT = 192
"""What may wait on the device of what came in, over all rounds: runs whose mixes do, and as one
more what a round needs besides (its target's event, the done event, its results), four calls each.
A driver's queue takes about a thousand before a call blocks, which would hold up every other round.
A round counts only while the device has work of it: one that waits for its partner's next chunk
must keep no other from ending. Not tuned."""

MOST_ROWS = 65535
"""Of blocks in a launch, so chunks of a run at most (CUDA's limit of a grid's second dimension)."""


@jit.njit
def words_of(mailbox: Any) -> Any:
    """The device side of a mailbox that has one."""
    return jit.view_words(mailbox[w.DEVICE], WORDS)


@jit.njit
def staged(mailbox: Any) -> bool:
    """Whether the next chunk to be put is in its staging place (no device: where it always is)."""
    if mailbox[w.DEVICE] == 0:
        return True
    device = words_of(mailbox)
    return device[ROUND_TURN] == mailbox[w.TURN] and mailbox[w.PUT] < device[LEFT]  # type: ignore[no-any-return]


@jit.njit
def launched(mailbox: Any) -> bool:
    """Whether all of the round under way is enqueued on the device."""
    device = words_of(mailbox)
    return device[ROUND_TURN] == mailbox[w.TURN] and device[PHASE] >= LAUNCHED  # type: ignore[no-any-return]


@jit.njit
def _broken(mailbox: Any, status: int) -> int:
    """End the round: a call of the device's driver returned `status`."""
    return rounds.fail(mailbox, w.DEVICE_FAILED - status)


@jit.njit
def _nbytes_of(mailbox: Any, part: int, count: int) -> int:
    """Bytes of `count` chunks from `part` on."""
    left = mailbox[w.NBYTES] - part * mailbox[w.CHUNK]
    return min(count * mailbox[w.CHUNK], left)  # type: ignore[no-any-return]


@jit.njit
def _run_event(address: int, number: int) -> Any:
    """The event of run `number` of a ring, and how many chunks are through when it completes."""
    return jit.view_words(address + 16 * number, 2)


@jit.njit
def _in_slot(mailbox: Any, part: int) -> int:
    """How many chunks of the round, from `part` on, lie side by side in one slot."""
    inside = place_of(mailbox, mailbox[w.ROUND], part) % mailbox[w.PER_SLOT]
    return min(mailbox[w.PER_SLOT] - inside, mailbox[w.PARTS] - part)  # type: ignore[no-any-return]


@jit.njit
def _way(engine: Any, mailbox: Any, device: Any) -> int:
    """Where the partner's slots on its device are, if this round's chunks go there; else 0."""
    to = mailbox[w.TO]
    if to < 0 or device[WAYS] == 0 or mailbox[w.CHECKS] != 0:
        return 0
    mapped = sending.twin(engine, mailbox, to)[2] != 0
    if not mapped and mailbox[w.NBYTES] <= engine[w.EAGER]:
        return 0
    return jit.view_words(device[WAYS], engine[w.RANKS])[to]  # type: ignore[no-any-return]


@jit.njit
def _begin(mailbox: Any, device: Any, table: Any) -> int:
    """Start on a round whose source's event has completed; an error, or 0."""
    device[PHASE] = MOVING
    if mailbox[w.FROM] < 0 or mailbox[w.OPERATION] == w.COPY:
        return 0
    return t.copy(table, device[RESULTS], device[ZEROS], 16 * mailbox[w.PARTS], table[t.IN])


@jit.njit
def _run_to_stage(mailbox: Any, device: Any, part: int) -> int:
    """How many chunks from `part` on may be copied to staging places now.

    Half of the places at a time, so that one half is copied to while the other is put from.
    """
    places = device[OUT_PLACES]
    run = min(max(1, places // 2), places - part % places, mailbox[w.PARTS] - part)
    return run if part + run - mailbox[w.SENT] <= places else 0


@jit.njit
def _run_by_way(engine: Any, mailbox: Any, device: Any, part: int) -> int:
    """How many chunks from `part` on may be copied to the partner's slots on its device now."""
    if device[OUT_RUNS] - device[OUT_SEEN] == device[OUT_PLACES]:
        return 0
    given = jit.view_words(mailbox[w.CREDITS], engine[w.RANKS])
    opened = jit.load_acquire(given, mailbox[w.TO]) - position(mailbox, mailbox[w.ROUND], part)
    run = min(device[WAY_RUN], _in_slot(mailbox, part))
    return max(0, min(run, opened))  # type: ignore[no-any-return]


@jit.njit
def _copy_out(engine: Any, mailbox: Any, device: Any, table: Any) -> int:
    """Enqueue the copy of the next chunks to where they go if that is free; 1 if it was."""
    part = device[COPIED]
    if mailbox[w.TO] < 0 or part == mailbox[w.PARTS]:
        return 0
    if device[WAY] != 0:
        run = _run_by_way(engine, mailbox, device, part)
        place = place_of(mailbox, mailbox[w.ROUND], part)
        to = device[WAY] + place_offset(mailbox, place)
    else:
        run = _run_to_stage(mailbox, device, part)
        to = device[OUT] + part % device[OUT_PLACES] * mailbox[w.CHUNK]
    if run == 0:
        return 0
    source = device[SOURCE] + part * mailbox[w.CHUNK]
    status = t.copy(table, to, source, _nbytes_of(mailbox, part, run), table[t.OUT])
    event = _run_event(device[OUT_EVENTS], device[OUT_RUNS] % device[OUT_PLACES])
    if status == 0:
        status = t.record(table, event[0], table[t.OUT])
    if status != 0:
        return _broken(mailbox, status)
    device[COPIED] = event[1] = part + run
    device[OUT_RUNS] += 1
    return 1


@jit.njit
def _see_left(mailbox: Any, device: Any, table: Any) -> int:
    """Count the chunks that have come to their places; whether any did."""
    before = device[OUT_SEEN]
    while device[OUT_SEEN] < device[OUT_RUNS]:
        event = _run_event(device[OUT_EVENTS], device[OUT_SEEN] % device[OUT_PLACES])
        status = t.query(table, event[0])
        if status == t.NOT_READY:
            break
        if status != 0:
            return _broken(mailbox, status)
        device[LEFT] = event[1]
        device[OUT_SEEN] += 1
    return device[OUT_SEEN] - before  # type: ignore[no-any-return]


@jit.njit
def _signal(engine: Any, mailbox: Any, part: int) -> int:
    """Say that chunk `part` is in its slot on the partner's device; an error status, or 0."""
    to, number = mailbox[w.TO], mailbox[w.ROUND]
    place = place_of(mailbox, number, part)
    word = word_of(engine, mailbox, number, part) | w.ON_DEVICE
    peer = sending.twin(engine, mailbox, to)
    if peer[2] != 0:
        signals = jit.view_words(peer[2] + mailbox[w.SIGNALS_OFFSET] + 8 * place, 1)
        jit.store_release(signals, 0, word)
        return 0
    kept = mailbox[w.OUTGOING] + 8 * sending.outgoing(mailbox, part)
    jit.view_words(kept, 1)[0] = word
    remote = peer[0] + mailbox[w.SIGNALS_OFFSET] + 8 * place
    endpoint = sending.endpoint_of(engine, to)
    status = sending.forget(ops.put(endpoint, kept, 8, remote, peer[1], mailbox[w.OUT_PARAM]))
    if status == 0 and not jit.view_words(engine[w.WAKES], engine[w.RANKS])[to]:
        status = sending.ring(engine, mailbox, part)
    return status


@jit.njit
def _signal_all(engine: Any, mailbox: Any, part: int, end: int) -> int:
    """Say that the chunks from `part` to before `end` are in their slots; an error, or 0.

    All of them, or their owner would mix chunk by chunk. It is woken once where signals are stores.
    """
    for each in range(part, end):
        status = _signal(engine, mailbox, each)
        if status < 0:
            return status
        mailbox[w.PUT] = each + 1  # without a request: `reap` counts it as sent
    direct = sending.twin(engine, mailbox, mailbox[w.TO])[2]
    if direct != 0 and sending.dozes(mailbox, direct):
        return sending.ring(engine, mailbox, end - 1)
    return 0


@jit.njit
def _put(engine: Any, mailbox: Any, device: Any) -> int:
    """Put the next chunk from its staging place, or signal those that are in their slots; 1."""
    part = mailbox[w.PUT]
    if device[WAY] != 0:
        status = _signal_all(engine, mailbox, part, device[LEFT])
        return rounds.fail(mailbox, status) if status < 0 else 1
    staging = device[OUT] + (part % device[OUT_PLACES]) * mailbox[w.CHUNK]
    # `rounds` finds chunk c of a round at SOURCE + c * CHUNK.
    mailbox[w.SOURCE] = staging - part * mailbox[w.CHUNK]
    mailbox[w.SOURCE_PARAM] = device[OUT_PARAM]
    return rounds.put_next(engine, mailbox)


@jit.njit
def _launch(device: Any, table: Any, kernel: int, nbytes: int, rows: int) -> int:
    """Enqueue a kernel of `rows` rows of blocks, each for `nbytes` at most."""
    useful = (nbytes + 16 * table[t.THREADS] - 1) // (16 * table[t.THREADS])
    blocks = min(max(1, table[t.BLOCKS] // rows), useful)
    arguments = mailbox_arguments(device) + 8 * VALUES
    return t.launch(table, kernel, blocks, rows, table[t.IN], arguments)


@jit.njit
def mailbox_arguments(device: Any) -> int:
    """Address of the values that kernels get; their addresses follow them."""
    return device[ARGUMENTS + VALUES]  # type: ignore[no-any-return]


@jit.njit
def _mix(
    mailbox: Any, floats: Any, device: Any, table: Any, part: int, run: int, source: int
) -> int:
    """Enqueue the kernels that mix `run` chunks from `part` on, at `source`; an error, or 0."""
    nbytes = _nbytes_of(mailbox, part, run)
    double = mailbox[w.OPERATION] == w.MIX_FLOAT64
    device[ARGUMENTS] = mailbox[w.TARGET] + part * mailbox[w.CHUNK]
    device[ARGUMENTS + 1] = source
    alpha = mailbox_arguments(device) + 16
    if double:
        jit.view_float64(alpha, 1)[0] = floats[w.ALPHA]
    else:
        jit.view_float32(alpha, 1)[0] = np.float32(floats[w.ALPHA])
    size = 8 if double else 4
    device[ARGUMENTS + 3] = nbytes // size
    device[ARGUMENTS + 4] = device[RESULTS] + 16 * part
    device[ARGUMENTS + 5] = mailbox[w.CHUNK] // size
    first = t.KERNELS + (t.PER_KIND if double else 0)
    if mailbox[w.WHOLE] == 0:  # what is left out is nothing, so that its chunks are one
        return _launch(device, table, table[first + t.MIX], nbytes, 1)
    each = min(nbytes, mailbox[w.CHUNK])
    status = _launch(device, table, table[first + t.GAUGE], each, run)
    if status != 0:
        return status
    return _launch(device, table, table[first + t.MIX_WHOLE], each, run)


@jit.njit
def _take_in(
    mailbox: Any, floats: Any, device: Any, table: Any, part: int, run: int, came: int, there: bool
) -> int:
    """Enqueue all that is done with `run` chunks from `part` on, in slots from `came` on.

    there: the slots are on the device. An error, or 0.
    """
    nbytes, place = _nbytes_of(mailbox, part, run), part % device[IN_PLACES]
    if part == 0 and device[TARGET_EVENT] != 0:
        status = t.wait(table, table[t.IN], device[TARGET_EVENT])
        if status != 0:
            return status
    if mailbox[w.OPERATION] == w.COPY:
        target = mailbox[w.TARGET] + part * mailbox[w.CHUNK]
        status = t.copy(table, target, came, nbytes, table[t.IN])
    elif there:
        status = _mix(mailbox, floats, device, table, part, run, came)
    else:
        inside = device[IN] + place * mailbox[w.CHUNK]
        status = t.copy(table, inside, came, nbytes, table[t.IN])
        if status == 0:
            status = _mix(mailbox, floats, device, table, part, run, inside)
    if status != 0:
        return status
    event = _run_event(device[IN_EVENTS], device[IN_RUNS] % device[IN_EVENTS_COUNT])
    device[ENQUEUED] = event[1] = part + run
    device[IN_RUNS] += 1
    return t.record(table, event[0], table[t.IN])


@jit.njit
def _in_flight(engine: Any) -> int:
    """What of all rounds is enqueued and not seen to have completed, as `MOST_IN_FLIGHT` counts."""
    found = 0
    for index in range(engine[w.MAILBOXES]):
        mailbox = mailbox_words(engine, index)
        if mailbox[w.DEVICE] != 0 and jit.load_acquire(mailbox, w.STATE) == w.ACTIVE:
            device = words_of(mailbox)
            if device[ROUND_TURN] == mailbox[w.TURN]:
                runs = device[IN_RUNS] - device[IN_SEEN]
                found += runs + (runs > 0 or device[PHASE] == LAUNCHED)
    return found


@jit.njit
def _may_mix(engine: Any, mailbox: Any, device: Any, part: int) -> int:
    """Where chunk `part` waits to be mixed, `IN_HOST` or `IN_DEVICE`; `NOWHERE` if it cannot be.

    In place, its own copy must have left the device.
    """
    if mailbox[w.TO] >= 0 and device[LEFT] <= part and device[SOURCE] == mailbox[w.TARGET]:
        return NOWHERE
    number = mailbox[w.ROUND]
    place, expected = place_of(mailbox, number, part), word_of(engine, mailbox, number, part)
    found = jit.load_acquire(signal_words(mailbox), place)
    if found == expected:
        return IN_HOST
    there = device[SLOTS_HERE] != 0 and found == expected | w.ON_DEVICE
    return IN_DEVICE if there else NOWHERE


@jit.njit
def _take_next(engine: Any, mailbox: Any, floats: Any, device: Any, table: Any) -> int:
    """Enqueue the mix of the next chunks if they have come and may be mixed; 1 if it was."""
    part = device[ENQUEUED]
    if mailbox[w.FROM] < 0 or part == mailbox[w.PARTS]:
        return 0
    if jit.load_acquire(mailbox, w.HELD) != 0:
        return 0
    where = _may_mix(engine, mailbox, device, part)
    if where == NOWHERE or _in_flight(engine) >= device[MOST]:
        return 0
    most = min(_in_slot(mailbox, part), MOST_ROWS)
    if where == IN_HOST:
        most = min(most, device[IN_PLACES] - part % device[IN_PLACES])
    number = mailbox[w.ROUND]
    slots = device[SLOTS_HERE] if where == IN_DEVICE else mailbox[w.SLOTS]
    came = slots + place_offset(mailbox, place_of(mailbox, number, part))
    run = 0
    while run < most and (run == 0 or _may_mix(engine, mailbox, device, part + run) == where):
        chunk, nbytes = came + run * mailbox[w.CHUNK], _nbytes_of(mailbox, part + run, 1)
        if where == IN_HOST and not intact(engine, mailbox, number, part + run, chunk, nbytes):
            break
        run += 1
    if run == 0:
        mailbox[w.MIXED] = part  # the chunk that the error names
        return rounds.fail(mailbox, w.CORRUPT)
    status = _take_in(mailbox, floats, device, table, part, run, came, where == IN_DEVICE)
    if status != 0:
        return _broken(mailbox, status)
    return 1


@jit.njit
def _see_mixed(mailbox: Any, device: Any, table: Any) -> int:
    """Count the chunks that are mixed and out of their slots; whether any became so."""
    before = device[IN_SEEN]
    while device[IN_SEEN] < device[IN_RUNS]:
        event = _run_event(device[IN_EVENTS], device[IN_SEEN] % device[IN_EVENTS_COUNT])
        status = t.query(table, event[0])
        if status == t.NOT_READY:
            break
        if status != 0:
            return _broken(mailbox, status)
        mailbox[w.MIXED] = event[1]
        device[IN_SEEN] += 1
    return device[IN_SEEN] - before  # type: ignore[no-any-return]


@jit.njit
def _see_launched(mailbox: Any, device: Any, table: Any) -> int:
    """Record the done event once nothing is left to enqueue; 1 if it was."""
    if mailbox[w.TO] >= 0 and device[LEFT] < mailbox[w.PARTS]:
        return 0
    if mailbox[w.FROM] >= 0 and device[ENQUEUED] < mailbox[w.PARTS]:
        return 0
    status = t.record(table, device[DONE_EVENT], table[t.IN])
    if status == 0 and mailbox[w.FROM] >= 0 and mailbox[w.OPERATION] != w.COPY:
        nbytes = 16 * mailbox[w.PARTS]
        status = t.copy(table, device[RESULTS_HERE], device[RESULTS], nbytes, table[t.IN])
    if status == 0:
        status = t.record(table, device[END_EVENT], table[t.IN])
    if status != 0:
        return _broken(mailbox, status)
    jit.store_release(device, PHASE, LAUNCHED)
    return 1


@jit.njit
def _gather(mailbox: Any, floats: Any, device: Any) -> None:
    """Add up what the kernels found, chunk by chunk, as `apply` does on the CPU."""
    if mailbox[w.FROM] < 0 or mailbox[w.OPERATION] == w.COPY:
        return
    parts = mailbox[w.PARTS]
    squares = jit.view_float64(device[RESULTS_HERE], 2 * parts)
    found = jit.view_words(device[RESULTS_HERE], 2 * parts)
    for part in range(parts):
        bits = found[2 * part + 1]
        mailbox[w.SPOILED] += bits & CAME_IN
        mailbox[w.OWN_SPOILED] += (bits & OWN) // OWN
        if bits == 0:
            floats[w.DISTANCE] += squares[2 * part]


@jit.njit
def _see_end(engine: Any, mailbox: Any, floats: Any, device: Any, table: Any) -> int:
    """End the round once its results are here and its puts have left; 1 if it did."""
    if device[PHASE] == LAUNCHED:
        status = t.query(table, device[END_EVENT])
        if status == t.NOT_READY:
            return 0
        if status != 0:
            return _broken(mailbox, status)
        _gather(mailbox, floats, device)
        device[PHASE] = ENDED
    return rounds.finish(engine, mailbox)


@jit.njit
def _step(engine: Any, mailbox: Any, floats: Any, device: Any, table: Any, turn: bool) -> int:
    if device[PHASE] == WAITING:
        if device[SOURCE_EVENT] != 0:
            status = t.query(table, device[SOURCE_EVENT])
            if status == t.NOT_READY:
                return 0
            if status != 0:
                return _broken(mailbox, status)
        status = _begin(mailbox, device, table)
        if status != 0:
            return _broken(mailbox, status)
    moved = _see_left(mailbox, device, table)
    if turn and mailbox[w.STATE] != w.FAILED:
        moved += _put(engine, mailbox, device)
    if mailbox[w.STATE] != w.FAILED:
        moved += rounds.reap(mailbox)
    if mailbox[w.STATE] != w.FAILED:
        moved += _copy_out(engine, mailbox, device, table)
    if mailbox[w.STATE] != w.FAILED:
        moved += _take_next(engine, mailbox, floats, device, table)
    if mailbox[w.STATE] != w.FAILED:
        moved += _see_mixed(mailbox, device, table)
    if mailbox[w.STATE] != w.FAILED and device[PHASE] == MOVING:
        moved += _see_launched(mailbox, device, table)
    if mailbox[w.STATE] != w.FAILED and device[PHASE] >= LAUNCHED:
        moved += _see_end(engine, mailbox, floats, device, table)
    return moved


@jit.njit
def _awaits_device(mailbox: Any, device: Any) -> bool:
    """Whether the device has something to do for this round, of whose end nobody is woken."""
    return (  # type: ignore[no-any-return]
        device[PHASE] == WAITING
        or device[PHASE] == LAUNCHED
        or device[LEFT] < device[COPIED]
        or mailbox[w.MIXED] < device[ENQUEUED]
    )


def advance_device(engine: Any, index: int, turn: bool) -> int:
    """Move the active round of a mailbox on a device as far as it goes now; as `rounds.advance`.

    turn: whether it may put a chunk now, where `may_put` and `staged` said so.
    """
    return advance_at(engine[w.ADDRESS], index, turn)


jit.compiled_as(
    advance_device,
    lambda engine, index, turn: jit.call(
        engine[w.ADVANCE_DEVICE], (engine[w.ADDRESS], index, int(turn))
    ),
)


@jit.njit
def advance_at(address: int, index: int, turn: int) -> int:
    """As `advance_device`, of the engine whose words are at `address`.

    Called by its address, so that it need be compiled only where there is a device.
    """
    engine = jit.view_words(address, w.ENGINE_WORDS)
    mailbox, floats = mailbox_words(engine, index), mailbox_floats(engine, index)
    device = words_of(mailbox)
    if device[ROUND_TURN] != mailbox[w.TURN]:
        device[SOURCE] = mailbox[w.SOURCE]
        device[WAY] = _way(engine, mailbox, device)
        device[COPIED] = device[LEFT] = device[ENQUEUED] = 0
        device[OUT_RUNS] = device[OUT_SEEN] = device[IN_RUNS] = device[IN_SEEN] = 0
        device[PHASE] = WAITING
        jit.store_release(device, ROUND_TURN, mailbox[w.TURN])
    if mailbox[w.FROM] >= 0:
        number = mailbox[w.ROUND]
        mixed = position(mailbox, number, mailbox[w.MIXED])
        status = credits.grant_for(engine, mailbox, mailbox[w.FROM], number, mixed)
        if status < 0:
            return rounds.fail(mailbox, status)
    table = jit.view_words(device[TABLE], t.WORDS)
    mode = mailbox[w.DEVICE] + 8 * MODE
    status = t.push(table, mode)
    if status != 0:
        return _broken(mailbox, status)
    moved = _step(engine, mailbox, floats, device, table, turn != 0)
    t.pop(table, mode)
    if mailbox[w.STATE] == w.ACTIVE and _awaits_device(mailbox, device):
        engine[w.NAPS] = 1
    return moved
