"""`python -m cocosctl` is `cocosctl`: where a process starts, before anything is loaded."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line of this process and exit with its code. Ctrl-C ends here, also while it loads."""
    try:
        from cocosctl import app

        app.main()
    except KeyboardInterrupt:
        # A second one would leave a traceback of what is being taken down; a third ends that at once.
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_DFL))
        from cocosctl.exits import ExitCode
        from cocosctl.output import say

        say("interrupted")
        sys.exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    main()
