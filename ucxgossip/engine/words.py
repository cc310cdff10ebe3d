"""The words that Python and compiled code share: one int64 array an engine, one row a mailbox.

Plain indices into int64 arrays, because compiled code, interpreted code, the active-message
handlers (which get a bare address) and Python all read them. Words that several threads write are
touched by the atomics of `jit` only, and stand on cache lines of their own.
"""

from __future__ import annotations

# --- engine words ------------------------------------------------------------------------------
WORKER = 0  # ucp_worker_h
EVENT_FD = 1  # the worker's event descriptor
ENGINE_FD = 2  # eventfd that wakes the engine thread
DRIVER_FD = 3  # eventfd that wakes a waiting caller that drives
TABLE = 4  # address of the mailbox table
MAILBOXES = 5  # rows in use
ENDPOINTS = 6  # address of ucp_ep_h by rank, 0 where there is none
RANKS = 7  # length of that
EAGER = 8  # largest payload that travels with its signal in one message, bytes
RING = 9  # 1 where others may store into this rank's memory, which wakes nobody
EPOCH = 10  # membership epoch
PLAIN = 11  # address of an empty ucp_request_param_t
EAGER_PARAM = 12  # address of the ucp_request_param_t of active messages above SHORT bytes
MALFORMED = 13  # active messages refused
SLEEPS = 14  # times a thread slept
SPINS = 15  # idle passes before yielding
YIELDS = 16  # idle passes that yield before sleeping, at most
RANK = 17  # this rank
FLOAT_TABLE = 18  # address of the mailboxes' floats
POSTS = 19  # rounds posted so far

ASLEEP = 20  # 1 while the engine thread sleeps on the worker
DOZING = 21  # 1 while the mailboxes' doze words are raised
EXACT = 22  # 1: a credit opens the round that it is asked for and none beyond
PARKED = 23  # not 0 while the engine thread has stepped back for callers (`drive.SHORT`, `LONG`)

LOCK = 24  # 1 while a thread drives the worker
DRIVERS = 32  # callers that drive or want to
LEAVING = 33  # callers that have driven, and may have the engine thread left to kick
DRIVES = 40  # calls that drove, so far
QUIET = 41  # passes in a row in which nothing moved
SLEPT = 42  # 1 if somebody slept since something moved
PATIENCE = 43  # idle passes that yield before sleeping, now
WAKES = 44  # address of: 1 where a put wakes its target, by rank
BELLS = 45  # bells sent
NAPS = 46  # 1 where a device works for a round: nobody is woken when it is done
SHORT_PARAM = 47  # as EAGER_PARAM, of those up to SHORT bytes
STOP = 48  # 1 ends the engine thread
ADDRESS = 49  # of these words
MOVE = 50  # address of `drive.move_rounds` as a C function
APPLY = 51  # of `apply.apply_at`
ADVANCE_DEVICE = 52  # of `device_rounds.advance_at`; 0: no device so far
SHUT = 53  # not 0 once nobody may drive any more
ANSWERS = 54  # 1: a round of several messages ends only once its target has said that it has them
ASKED = 55  # 1 where the message being handled asks for that answer
LARGEST = 56  # bytes of the largest chunk of any mailbox
UNSEEN = 57  # bells whose signal was not visible yet; (mailbox, round, chunk) triples follow
UNSEEN_MAX = 64
HEADER_COPY = UNSEEN + 1 + 3 * UNSEEN_MAX  # an aligned copy of the header being handled
ENGINE_WORDS = HEADER_COPY + 8

# --- mailbox words: fixed ----------------------------------------------------------------------
STATE = 0
SLOTS = 1  # local address of slot 0
SIGNALS = 2  # local address of the signal words
OUTGOING = 3  # local address of the ring of words put from
STRIDE = 4  # bytes between slots
PLACES = 5  # chunks that all slots hold
CHUNK = 6  # bytes
CHUNKS = 7  # of the largest round
CAPACITY = 8  # bytes of the largest round
WINDOW = 9  # chunks in flight
CREDITS = 10  # local address of the credits that others gave, by rank: chunks below may be put
PEERS = 11  # local address of (address, rkey, local pointer or 0) by rank
REQUESTS = 12  # local address of requests in flight, `PIECES` for each of `WINDOW` chunks
HEADERS = 13  # local address of a ring of message headers
SLOTS_OFFSET = 14  # of slot 0 in the region, equal on all ranks
SIGNALS_OFFSET = 15
OUT_PARAM = 16  # ucp_request_param_t of signal puts
INDEX = 17  # this row's number
AHEAD = 18  # how many rounds before it is wanted a credit goes out
TOLD = 19  # local address of the credits given to others, by rank

# --- mailbox words: of the round under way -----------------------------------------------------
ROUND = 20  # number
SOURCE = 21  # address, or of a scatter-gather list where SCATTERED
SOURCE_PARAM = 22  # ucp_request_param_t of data puts
TARGET = 23  # address, or of such a list
NBYTES = 24
PARTS = 25  # chunks of this round
TO = 26  # rank put to, -1: none
FROM = 27  # rank received from, -1: none
OPERATION = 28
HELD = 29  # 1: do not mix yet
NEXT_WRITER = 30  # rank that puts round + AHEAD here, -1: none, or not known
PUT = 31  # chunks put
SENT = 32  # chunks whose source may change
MIXED = 33  # chunks mixed
FAILURE = 34  # a negative ucs_status_t
POSTED_NS = 35
DONE_NS = 36
TURN = 37  # how many rounds were posted in this engine before this one

# --- mailbox words: integrity ------------------------------------------------------------------
WHOLE = 40  # 1: a chunk that holds a NaN or an infinity is left out (of the round under way)
SPOILED = 41  # chunks left out because of what came in
OWN_SPOILED = 42  # chunks left out because of the target's own values
UNDO = 43  # local address of room for one chunk: the target before it was mixed
CHECKS = 44  # local address of the checksums that others put, 0: none travel
CHECKS_OFFSET = 45  # of those in the region, equal on all ranks
OUT_CHECKS = 46  # local address of the ring of checksums put from

# --- mailbox words: fixed, continued -----------------------------------------------------------
NUMBER = 47  # local address of the number of the next round
DOZE = 48  # local address of the doze word: 1 where a store must be followed by a bell
DOZE_OFFSET = 49  # of that in the region, equal on all ranks
CREDITS_OFFSET = 50
PER_SLOT = 51  # chunks that one slot holds
SCATTERED = 52  # 1: the round under way is of several arrays (`scattered`)
STAGING = 53  # local address of chunks in which pieces are brought together, 0: none yet
STAGING_PARAM = 54  # ucp_request_param_t of puts from there
WAYS = 55  # local address of what `ways` keeps, by rank
DEVICE = 56  # address of the words of `device_rounds`, 0: source and target are host memory
UNANSWERED = 57  # 1: the target was asked to say that it has all of the round under way
MAILBOX_WORDS = 58

ON_DEVICE = 1 << 47  # of a signal word: the chunk stands in the slots on the device

PIECES = 8
"""Puts of one chunk at most: one that stands in more pieces is brought together first."""

# --- floats of a mailbox -----------------------------------------------------------------------
ALPHA = 0
DISTANCE = 1  # squared distance of what was mixed, accumulated
FLOATS = 2

# --- values of STATE ---------------------------------------------------------------------------
IDLE = 0
ACTIVE = 1
DONE = 2
FAILED = 3
BROKEN = 4  # a change of members broke the round off

# --- values of OPERATION -----------------------------------------------------------------------
COPY = 0
MIX_FLOAT32 = 1
MIX_FLOAT64 = 2
DELTA_FLOAT32 = 3  # target becomes what mixing would add to it
DELTA_FLOAT64 = 4

# --- active messages ---------------------------------------------------------------------------
AM_DATA = 0
AM_CREDIT = 1
AM_BELL = 2
AM_TAKEN = 3
ASKS = 1 << 32  # of the sender's rank in a header: answer by AM_TAKEN
SHORT = 8192  # payloads that UCX had better copy, at once, than register and track, bytes
HEADER_WORDS = 6  # mailbox, round, chunk, epoch, the sender's rank, the credit it gives (0: none)
HEADER_BYTES = 8 * HEADER_WORDS
HEADER_RING = 64  # messages of a mailbox and kind that may wait; no window is larger
CHECKED_HEADER_BYTES = HEADER_BYTES + 8  # of data with a checksum, which follows

# --- values of FAILURE that are no ucs_status_t (those end at -100) ----------------------------
CORRUPT = -1000  # a chunk is not what its checksum says
DEVICE_FAILED = -10000  # less the error (above 0) that a call of the device's driver returned
