"""Puts the files of an export where they belong, over nothing that is there."""

import hashlib
from collections.abc import Mapping

from swav.storage import Location, is_remote, join, local_path, read, stat, write_atomic

ALONE = ""  # name of the file of an export that is one file: the output itself


def check_place(output: Location, endings: tuple[str, ...]) -> None:
    """Refuse a place that cannot take an export, before anything is computed.

    Args:
        output: a file's url, or a folder's where there are no endings.
        endings: by which the readers of the format know their files.

    Raises:
        ValueError: it is a folder for a file, a file for a folder, of another ending, or on a web server.
    """
    text = str(output)
    if text.startswith(("http://", "https://")):
        raise ValueError(f"--output {output}: a web server is only read; write to a folder or to s3://bucket/key")
    if endings and not text.endswith(endings):
        raise ValueError(f"--output {output}: readers of this format know it by its name; end it with {endings[0]}")
    if is_remote(output):
        return
    path = local_path(output)
    if endings and path.is_dir():
        raise ValueError(f"--output {output} is a folder; name the file")
    if not endings and path.exists() and not path.is_dir():
        raise ValueError(f"--output {output} is a file, and this format is a folder; name another place")


def publish(files: Mapping[str, bytes], output: Location) -> dict[str, str]:
    """Write files, each whole or not at all, in their order; what is there already, to the byte, is left.

    An interrupted call is completed by the same call. Whoever waits for the last file finds all others.

    Args:
        files: content by name below the output; :data:`ALONE` for the output itself.
        output: a file or a folder.

    Returns:
        SHA-256 by url.

    Raises:
        ValueError: something else is there; then nothing is written.
        OSError: a file cannot be written.
    """
    urls = {name: join(output, name) if name != ALONE else str(output) for name in files}
    missing = []
    for name, data in files.items():
        there = stat(urls[name])
        if there is None:
            missing.append(name)
        elif there.num_bytes != len(data) or read(urls[name]) != data:
            raise ValueError(
                f"{urls[name]} is there already and is not this export; name another --output, or remove it first"
            )
    for name in missing:
        write_atomic(urls[name], files[name])
    return {urls[name]: hashlib.sha256(data).hexdigest() for name, data in files.items()}
