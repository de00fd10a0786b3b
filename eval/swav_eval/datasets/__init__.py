"""Public data sets, as they are published, written as shards: ``python -m swav_eval.datasets NAME SOURCE OUT``."""
