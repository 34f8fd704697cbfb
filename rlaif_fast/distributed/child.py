"""What runs first in a process that `launch` started. It imports little, so the end of the parent is soon noticed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading

LOST = 76  # exit code of a process that ended because another one did: EX_PROTOCOL of sysexits.h


def run(call: bytes) -> None:
    """Call what `call` holds, a pickled (function, *arguments); end at once where the parent process ends.

    The function is unpickled here, behind the watch: its imports (torch) take seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function, *arguments = pickle.loads(call)
    function(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(LOST)
