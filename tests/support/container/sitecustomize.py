"""Python reads this at its start where the folder is on PYTHONPATH: a trainer's command stays as a pod has it.

In a rank of the main job, and nowhere else, the steps wait for the test and the samples are noted: see
:mod:`swav_testing.gated`.
"""

import sys

if "swav.pretrain" in sys.orig_argv and "swav.elastic" not in sys.orig_argv:
    from swav_testing.gated import install

    install()
