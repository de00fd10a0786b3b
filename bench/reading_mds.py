"""The part of bench/reading.py that runs in a Python with mosaicml-streaming, which need not have this project.

python bench/reading_mds.py write TARS OUT     writes the images of tars as MDS
python bench/reading_mds.py read SOURCE        reads all samples, and prints the times as JSON
"""

import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path


def write(tars: Path, out: Path) -> None:
    """Write the images of all tars."""
    from streaming import MDSWriter  # type: ignore[import-not-found]

    with MDSWriter(out=str(out), columns={"jpg": "bytes"}, size_limit=1 << 26) as writer:
        for path in sorted(tars.glob("*.tar")):
            with tarfile.open(path) as shard:
                for member in shard:
                    stream = shard.extractfile(member)
                    if stream is not None and member.name.endswith(".jpg"):
                        writer.write({"jpg": stream.read()})


def read(source: str) -> None:
    """Read all samples in order, from a folder or from a store through a new folder."""
    from streaming import StreamingDataset

    with tempfile.TemporaryDirectory() as scratch:
        where = {"remote": source, "local": scratch} if "://" in source else {"local": source}
        dataset = StreamingDataset(**where, shuffle=False, batch_size=64)
        wall, cpu = time.perf_counter(), time.process_time()
        num_images = sum(1 for sample in dataset if sample["jpg"])
        times = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    sys.stdout.write(json.dumps({"num_images": num_images, **times}))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        read(sys.argv[2])
