"""The driver: pretraining, then evaluations, as jobs that follow from what is in the run's folder.

``python -m swav_components.driver --run URL --scheduler kubernetes --pretrain '...' --evaluate 'knn ...'``;
docs/driver.md tells how it works and what it promises.
"""
