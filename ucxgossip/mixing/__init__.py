"""What an exchange does to values, without torch: modes, streams of rounds, exact collectives.

`modes` names the choices, `stream`, `push_sum` and `outer` are the manners in which one flat array
is exchanged (`device`, `direct`: on a device), `collective` computes what must be exact, `meter`
counts.
"""

from ucxgossip.mixing.collective import Collective
from ucxgossip.mixing.device import HELD_LANES, DeviceArray, DeviceHeld, DeviceInPlace
from ucxgossip.mixing.direct import serve
from ucxgossip.mixing.meter import Meter
from ucxgossip.mixing.modes import (
    COMBINES,
    MIXES,
    Modes,
    Nesterov,
    default_schedule,
    weights_shift,
)
from ucxgossip.mixing.outer import Outer
from ucxgossip.mixing.push_sum import PushSum, check_push_sum
from ucxgossip.mixing.stream import Held, InPlace, Stale, Stream

__all__ = [
    "COMBINES",
    "HELD_LANES",
    "MIXES",
    "Collective",
    "DeviceArray",
    "DeviceHeld",
    "DeviceInPlace",
    "Held",
    "InPlace",
    "Meter",
    "Modes",
    "Nesterov",
    "Outer",
    "PushSum",
    "Stale",
    "Stream",
    "check_push_sum",
    "default_schedule",
    "serve",
    "weights_shift",
]
