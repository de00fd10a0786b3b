"""The preflight, ``python -m swav.doctor``: finds out before a run what would end it. See docs/doctor.md."""
