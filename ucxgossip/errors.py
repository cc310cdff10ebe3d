"""Every error that ucxgossip raises on purpose.

GossipError
 +-- ArgumentError (ValueError)          an argument that cannot be served
 |    +-- ArrayError                     an array or tensor: layout, dtype, device, size
 |    +-- ScheduleError                  a schedule that does not fit the group
 |    +-- TokenError                     a token too short, or in a file that others may read
 +-- LibraryError (ImportError)          libucp
 |    +-- LibraryNotFoundError           no libucp on this machine
 |    +-- LibrarySymbolError             a libucp that lacks a function we call
 +-- BackendError (RuntimeError)         a mixing kernel that cannot run here
 |    +-- MissingExtraError (ImportError)    its package; the message names the extra to install
 |    +-- NoDeviceError                  no CUDA device, or no driver for it
 |    +-- CudaVersionError               a UCX wheel for another CUDA than the driver's
 +-- DeviceError (RuntimeError)          a call of the device's driver returned an error
 +-- UCXError (RuntimeError)             a UCX call returned an error status
 +-- RendezvousError (RuntimeError)      the meeting of the ranks
 |    +-- PortInUseError                 another program listens on MASTER_PORT
 |    +-- RankMissingError (TimeoutError)    who did not come, and after how long
 |    +-- MismatchError                  ranks disagree; the same message on every rank
 |    +-- SignatureError                 something not signed with the job's token
 +-- ExchangeError (RuntimeError)        a round that did not end well
 |    +-- ExchangeTimeoutError (TimeoutError)  who was waited for, for what, how long
 |    +-- OutOfStepError                 another rank ended with fewer steps
 |    +-- PeerError                      another rank left with an error
 |    +-- ExpelledError                  the others go on without this rank
 |    +-- NonFiniteError                 NaN or Inf in what was to be mixed
 |    +-- IntegrityError                 a chunk is not what its checksum says
 +-- ClosedError (RuntimeError)          use after close()
 +-- ForkError (RuntimeError)            use in a forked child of what its parent made
 +-- ModelError (ValueError)             a model or optimizer that cannot be attached
 |    +-- AlreadyAttachedError           attach() twice
 |    +-- SparseGradientError            a sparse gradient
 |    +-- AccumulationError              a second backward over gradients under way
 +-- BenchError (RuntimeError)           a benchmark that could not measure what it says

Each message says what was wrong, where, and what to do. Arguments are checked before anything
changes.
"""

from __future__ import annotations


class GossipError(Exception):
    """Base of every error raised by ucxgossip."""

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling (process pools), whatever a subclass's constructor takes."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[GossipError], args: tuple[object, ...], state: dict[str, object]) -> object:
    layout = next(base for base in (OSError, ImportError, Exception) if issubclass(kind, base))
    error = layout.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ArgumentError(GossipError, ValueError):
    """An argument that cannot be served."""


class ArrayError(ArgumentError):
    """An array or tensor whose layout, dtype, device or size cannot be exchanged."""


class ScheduleError(ArgumentError):
    """A schedule that does not fit the group."""


class TokenError(ArgumentError):
    """The job's token cannot be used: too short, or in a file that is not this user's alone."""


class LibraryError(GossipError, ImportError):
    """libucp cannot be used."""


class LibraryNotFoundError(LibraryError):
    """No libucp was found on this machine."""


class LibrarySymbolError(LibraryError):
    """The libucp found lacks a function that ucxgossip calls."""


class BackendError(GossipError, RuntimeError):
    """A mixing kernel cannot run here."""


class MissingExtraError(BackendError, ImportError):
    """A package that a mixing kernel needs cannot be loaded; the message names the extra."""


class NoDeviceError(BackendError):
    """No CUDA device that this process can use."""


class CudaVersionError(BackendError):
    """The UCX wheel or CuPy is built for another CUDA than this machine's driver serves."""


class DeviceError(GossipError, RuntimeError):
    """A call of a device's driver returned an error.

    Attributes: `call`, the C function; `status`, its ``CUresult``; `name`, that one's name.
    """

    def __init__(self, call: str, status: int, name: str, detail: str = "") -> None:
        self.call, self.status, self.name = call, status, name
        super().__init__(f"{call}: {name} ({status}){': ' + detail if detail else ''}")


class UCXError(GossipError, RuntimeError):
    """A UCX call returned an error status.

    Attributes: `call`, the C function; `status`, the negative ``ucs_status_t``; `name`, its name.
    """

    def __init__(self, call: str, status: int, name: str, detail: str = "") -> None:
        self.call, self.status, self.name = call, status, name
        super().__init__(f"{call}: {name} ({status}){': ' + detail if detail else ''}")


class RendezvousError(GossipError, RuntimeError):
    """The ranks of the job could not meet."""


class PortInUseError(RendezvousError):
    """Another program listens on the port that rank 0 must open."""


class RankMissingError(RendezvousError, TimeoutError):
    """Some ranks did not come before the deadline. Attribute: `ranks`, those missing."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        self.ranks = ranks
        super().__init__(message)


class MismatchError(RendezvousError):
    """The ranks disagree on something all must share; every rank gets the same message."""


class SignatureError(RendezvousError):
    """Something in the job's store is not signed with the job's token."""


class ExchangeError(GossipError, RuntimeError):
    """A round did not end well."""


class ExchangeTimeoutError(ExchangeError, TimeoutError):
    """A round's deadline passed. Attributes: `rank` waited for, `what` for, `seconds` waited."""

    def __init__(self, message: str, rank: int, what: str, seconds: float) -> None:
        self.rank, self.what, self.seconds = rank, what, seconds
        super().__init__(message)


class OutOfStepError(ExchangeError):
    """This rank goes on where another one has ended: they took unequally many steps.

    Attributes: `rank` that has ended.
    """

    def __init__(self, message: str, rank: int) -> None:
        self.rank = rank
        super().__init__(message)


class PeerError(ExchangeError):
    """Another rank left the job with an error. Attribute: `rank`."""

    def __init__(self, message: str, rank: int) -> None:
        self.rank = rank
        super().__init__(message)


class ExpelledError(ExchangeError):
    """The others go on without this rank: it was taken for dead, or cannot hear enough of them."""


class NonFiniteError(ExchangeError):
    """NaN or Inf in what was to be mixed; the values that it would have met are as they were.

    Attributes: `rank` whose values they are; `what`, the kind of payload; `step`: how many
    optimizer steps were done when it was noticed, or the round of ``group.exchange``.
    """

    def __init__(self, message: str, rank: int, what: str, step: int) -> None:
        self.rank, self.what, self.step = rank, what, step
        super().__init__(message)


class IntegrityError(ExchangeError):
    """A chunk is not what its checksum says; it was not mixed.

    Attributes: `rank` that put it, `mailbox`, `round` and `chunk`, all counted from 0.
    """

    def __init__(self, message: str, rank: int, mailbox: int, round: int, chunk: int) -> None:
        self.rank, self.mailbox, self.round, self.chunk = rank, mailbox, round, chunk
        super().__init__(message)


class ClosedError(GossipError, RuntimeError):
    """Something was used after its close()."""


class ForkError(GossipError, RuntimeError):
    """A forked child used what its parent made, or UCX after its parent; nothing was touched."""


class ModelError(GossipError, ValueError):
    """A model or optimizer that cannot be attached."""


class AlreadyAttachedError(ModelError):
    """The model or optimizer is attached already; detach() it first."""


class SparseGradientError(ModelError):
    """A parameter got a sparse gradient, which has no fixed place in a bucket."""


class AccumulationError(ModelError):
    """A second backward reached gradients that are being exchanged; use ``gossip.no_sync()``."""


class BenchError(GossipError, RuntimeError):
    """A benchmark could not measure what it says."""
