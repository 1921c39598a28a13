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
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end in a traceback from what is taken down
        from cocosctl.exits import ExitCode
        from cocosctl.output import say

        say("interrupted")
        sys.exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    main()
