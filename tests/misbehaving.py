"""What workers do in tests. They import this module anew, so it imports nothing that takes time."""

import os
import signal
import sys
import threading
import time


def misbehave(how: str) -> str:
    """What a worker does with an item."""
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "hang":
        time.sleep(600)
    elif how == "raise":
        sys.exit(3)
    elif how == "die later":
        threading.Timer(0.2, os._exit, [9]).start()
    elif how == "die while answering":
        threading.Timer(0.2, os._exit, [9]).start()
        return "x" * (1 << 22)  # more than a pipe holds
    return how
