"""UCX's put, in Python: for those who want puts alone.

>>> from ucxgossip import ucp
>>> with ucp.Context("tcp") as context, ucp.Worker(context) as worker:
...     region = ucp.MemoryRegion(context, nbytes=4096)
...     endpoint = ucp.Endpoint(worker, worker.address)      # to itself
...     key = ucp.RemoteKey(endpoint, region.pack())
...     source = ucp.MemoryRegion(context, nbytes=4096)
...     endpoint.put(source, region.address, key)
"""

from ucxgossip.ucp.context import TRANSPORTS, Context
from ucxgossip.ucp.endpoint import Endpoint
from ucxgossip.ucp.lib import Library, load
from ucxgossip.ucp.memory import MemoryRegion, RemoteKey
from ucxgossip.ucp.worker import Worker

__all__ = [
    "TRANSPORTS",
    "Context",
    "Endpoint",
    "Library",
    "MemoryRegion",
    "RemoteKey",
    "Worker",
    "load",
]
