"""Runs the preflight: ``python -m swav.doctor``; see :mod:`swav.doctor.command`."""

import logging
import os
import sys

from swav.doctor.collectives import is_abandoned
from swav.doctor.command import main

if __name__ == "__main__":
    exit_status = main()
    if is_abandoned():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
