"""A cluster's network on one machine: a network namespace a rank, each on a link of one rate.

On loopback, ranks share the cores' memory bandwidth, so that time grows with their number whatever
they send; on links of one rate each, only what a rank itself sends and receives counts. The links
are pairs of virtual devices to a bridge that stands in a namespace of its own; `tbf` (a token
bucket) holds each to the rate in both directions: what leaves the rank at the rank's end, what
comes to it at the bridge's. Needs root and iproute2.

Nothing is made in the host's own namespace but the names of the new ones, which are random. They
are removed by name however the block ends, and with them all that is in them.

Rejected: netem (not in every kernel; delay and loss are no part of the question); limits by cgroup
or by pacing sockets (they know nothing of what comes in); one namespace with a device for each
rank (the kernel would send between addresses of its own by loopback); anonymous namespaces, held
by a process (`ip netns exec` and `ip -n` take names).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ucxgossip.bench.spawn import sigterm_as_exit
from ucxgossip.errors import ArgumentError, BenchError

_STEM = "ucxgossip"
DEVICE = "veth0"
"""A rank's own network device, in its namespace."""
MOST_RANKS = 250
_BRIDGE = "bridge0"
_BURST = 1 << 15
"""Bytes that may pass at once after a pause."""
_SEGMENTS = 1 << 14
"""Bytes of the largest packet before it is cut up: tbf would cut those above its burst itself."""
_QUEUE = "50ms"
"""What may wait for a link before packets are dropped."""
_COMMAND_S = 30.0
_CONTROLS = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def bits_per_second(rate: str) -> float:
    """The number of "200mbit" or "1.5gbit"; `ArgumentError` for what is no such rate."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    if match is None or not float(match[1]):
        raise ArgumentError(f"rate {rate!r}: write bits a second as in 200mbit or 1gbit")
    return float(match[1]) * _UNITS[match[2]]


def check(congestion: str | None = None) -> None:
    """`BenchError` that says what is missing where no network can be made.

    congestion: `ArgumentError` where the kernel has no such TCP congestion control at hand.
    """
    if os.geteuid() != 0:
        raise BenchError("network namespaces need root, and this user is not: nothing was measured")
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            raise BenchError(
                f"the command {command} is not installed; it is part of iproute2 (Debian: apt-get "
                "install iproute2): nothing was measured"
            )
    known = _CONTROLS.read_text(encoding="ascii").split()
    if congestion is not None and congestion not in known:
        raise ArgumentError(f"congestion control {congestion!r}: choose of {', '.join(known)}")


class Network:
    """Namespaces for `ranks` ranks on one bridge, while a `with` block lasts.

    rate: of each link, in each direction, such as "200mbit"; None: as fast as the machine is.
    keep_windows: TCP keeps its congestion window over a pause (the kernel forgets it by default).
    congestion: TCP's congestion control, such as "cubic"; by default the host's. `BenchError` where
    it cannot be made. What jobs that were killed left is removed first.
    """

    def __init__(
        self,
        ranks: int,
        rate: str | None = None,
        keep_windows: bool = False,
        congestion: str | None = None,
    ) -> None:
        if not 1 <= ranks <= MOST_RANKS:
            raise ArgumentError(f"a network of {ranks} ranks; must be 1 to {MOST_RANKS}")
        if rate is not None:
            bits_per_second(rate)
        self.ranks, self.rate = ranks, rate
        self._settings = ["net.ipv4.tcp_slow_start_after_idle=0"] if keep_windows else []
        self._congestion = congestion
        if congestion is not None:
            self._settings.append(f"net.ipv4.tcp_congestion_control={congestion}")
        stem = f"{_STEM}-{os.getpid()}-{secrets.token_hex(4)}"
        self.names = [f"{stem}-{rank}" for rank in range(ranks)]
        self.hub = f"{stem}-hub"
        self._made: list[str] = []
        self._guard = ExitStack()

    def command(self, rank: int) -> list[str]:
        """What to put before a command so that it runs at `rank`."""
        return ["ip", "netns", "exec", self.names[rank]]

    @staticmethod
    def address(rank: int) -> str:
        """The address of `rank`; of the range that RFC 2544 keeps for benchmarks."""
        return f"198.18.0.{rank + 1}"

    def variables(self, rank: int) -> dict[str, str]:
        """What `rank` is told of its place: rank 0's address, and that each is a host of its own.

        UCXGOSSIP_HOST is emptied, so that ranks find out their own addresses.
        """
        return {
            "MASTER_ADDR": self.address(0),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "UCXGOSSIP_HOST": "",
        }

    def cut(self, rank: int) -> None:
        """Take the link of `rank` down, at its own end."""
        _call("ip", "-n", self.names[rank], "link", "set", DEVICE, "down")

    def _make(self) -> None:
        for name in (self.hub, *self.names):
            self._made.append(name)  # before it is there: the command may be broken off
            _call("ip", "netns", "add", name)
            _call("ip", "-n", name, "link", "set", "lo", "up")
            for setting in self._settings:
                _call("ip", "netns", "exec", name, "sysctl", "-qw", setting)
        _call("ip", "-n", self.hub, "link", "add", _BRIDGE, "type", "bridge")
        _call("ip", "-n", self.hub, "link", "set", _BRIDGE, "up")
        for rank, name in enumerate(self.names):
            port = f"port{rank}"
            pair = ("type", "veth", "peer", "name", port, "netns", self.hub)
            _call("ip", "-n", name, "link", "add", DEVICE, *pair)
            _call("ip", "-n", self.hub, "link", "set", port, "master", _BRIDGE)
            _call("ip", "-n", name, "address", "add", f"{self.address(rank)}/24", "dev", DEVICE)
            for place, device in ((name, DEVICE), (self.hub, port)):
                if self.rate is not None:
                    _shape(place, device, self.rate)
                _call("ip", "-n", place, "link", "set", device, "up")

    def _remove(self) -> None:
        while self._made:
            with suppress(BenchError):  # one that was never made; the others are to go all the same
                _call("ip", "netns", "delete", self._made[-1])
            self._made.pop()

    def __enter__(self) -> Self:
        check(self._congestion)
        with ExitStack() as stack:
            stack.enter_context(sigterm_as_exit())
            stack.callback(self._remove)
            remove_left()
            self._make()
            self._guard = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._guard.close()


def remove_left() -> list[str]:
    """Remove the namespaces of jobs whose process is gone; their names.

    A process that was killed removes nothing.
    """
    named = re.compile(rf"{_STEM}-(\d+)-[0-9a-f]{{8}}-\w+")
    found = [named.fullmatch(line.split()[0]) for line in _call("ip", "netns", "list").splitlines()]
    left = [each[0] for each in found if each and not Path(f"/proc/{each[1]}").exists()]
    for name in left:
        _call("ip", "netns", "delete", name)
    return left


def _shape(place: str, device: str, rate: str) -> None:
    _call("ip", "-n", place, "link", "set", device, "gso_max_size", str(_SEGMENTS))
    bucket = ("rate", rate, "burst", str(_BURST), "latency", _QUEUE)
    _call("tc", "-n", place, "qdisc", "add", "dev", device, "root", "tbf", *bucket)


def _call(*command: str) -> str:
    """Run a command of iproute2, return what it printed; `BenchError` with what it said if not."""
    try:
        # In a session of its own: Ctrl-C must not end the commands that remove.
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            start_new_session=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{' '.join(command)}: {error}") from None
    if ended.returncode != 0:
        said = ended.stderr.strip() or f"ended with status {ended.returncode}"
        raise BenchError(f"{' '.join(command)}: {said}; may this machine make network namespaces?")
    return ended.stdout
