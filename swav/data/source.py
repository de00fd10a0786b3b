"""What a user may name as data: shards, a folder of images, or the embedded demo."""

import hashlib
import logging
import os
from pathlib import Path

from swav.data.demo import DEMO_SPLITS, write_demo_shards
from swav.data.index import DatasetIndex, open_index
from swav.data.write_shards import write_shards
from swav.storage import cache_folder, locked

_logger = logging.getLogger(__name__)


def open_dataset(url: str) -> DatasetIndex:
    """Open the data set at ``url``; the first process on a host prepares it, others wait.

    Args:
        url: a folder of webdataset tars; a folder of images, flat or with a subfolder per class, which is first written
            as shards into the cache; or ``demo/train`` or ``demo/test``, made on the spot.

    Raises:
        ValueError: there is nothing of the kind at ``url``.
    """
