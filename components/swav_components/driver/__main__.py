"""``python -m swav_components.driver --run URL --scheduler NAME --pretrain '...' [--evaluate 'knn ...' ...]``."""

import sys

from swav_components.driver.command import main

if __name__ == "__main__":
    sys.exit(main())
