"""The torch hook: `attach` makes any model and optimizer gossip. The only code that uses torch."""

from ucxgossip.torch_hook.attach import attach
from ucxgossip.torch_hook.gossip import Gossip

__all__ = ["Gossip", "attach"]
