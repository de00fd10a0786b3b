"""Runs a command that the kernel asks to end when the process that started it dies, however it dies.

``python tether.py PID COMMAND...``: PID is the starter's. The command takes this process's place, so it is the
starter's own child, under the same number; what is set here stays with it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Become the command; does not return."""
    starter, *command = arguments
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(starter):  # it died before
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
