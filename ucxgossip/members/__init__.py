"""Who is in the job: detection of dead ranks and agreement on those that live.

`agreement` is the protocol, without sockets or clocks; `links` carries its messages; `pulse` lets
others hear that this process lives; `door` says when guests may come in. `Warden` ties them
together: `switchboard` is its thread and connections, on it stand `watch` (who lives), `trial`
(who can be reached), `porter` (who comes in) and `warden` (what members ask of each other, and
their meetings).
"""

from ucxgossip.members.agreement import Agreement, Facts, View
from ucxgossip.members.door import ANY, NOW, OVER, SHUT, STEP, Door
from ucxgossip.members.warden import Warden

__all__ = ["ANY", "NOW", "OVER", "SHUT", "STEP", "Agreement", "Door", "Facts", "View", "Warden"]
