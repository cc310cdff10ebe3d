"""``python -m ucxgossip`` is the ``ucxgossip`` command."""

import sys

from ucxgossip.cli import main

if __name__ == "__main__":
    sys.exit(main())
