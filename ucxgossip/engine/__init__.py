"""The engine: posts puts, watches arrivals, mixes, grants credits, beside the training thread.

`words` is the shared state, `handlers` what arrives as messages, `rounds` the state machine of a
round, `apply` what a chunk does to the target, `checks` its checksum, `drive` who makes progress
and how it waits, `itinerary` rounds that are known ahead, `post` what a round is told, `engine` the
Python face.

Rejected: a Python thread that polls (the GIL would be taken thousands of times a second); an
engine that only its own thread may drive (two thread switches a blocking round); a process of its
own (another copy, and the parameters would have to live in shared memory).
"""

from ucxgossip.engine.engine import Constants, Engine
from ucxgossip.engine.post import Post

__all__ = ["Constants", "Engine", "Post"]
