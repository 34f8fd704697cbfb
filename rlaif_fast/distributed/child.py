"""The first code of a process that `launch` started. It imports little, so that it soon watches its parent."""

from __future__ import annotations

import pickle
import signal

from rlaif_fast.termination import end_with_parent

LOST = 76  # exit code of a process that ended because another one did: EX_PROTOCOL of sysexits.h


def run(call: bytes) -> None:
    """Call what `call` holds, a pickled (function, *arguments); end at once where the parent process ends.

    The function is unpickled here, after the watch has begun: its imports (torch) take seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the others
    end_with_parent(LOST)
    function, *arguments = pickle.loads(call)
    function(*arguments)
