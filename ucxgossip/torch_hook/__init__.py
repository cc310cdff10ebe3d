"""The torch hook: `attach` makes any model and optimizer gossip. The only code that uses torch."""

from ucxgossip.torch_hook.attach import Gossip, attach

__all__ = ["Gossip", "attach"]
