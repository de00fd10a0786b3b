"""Reads a list of images."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from swav import storage

Entry = tuple[int, str, str | None]  # line number, path and label


def read_list(url: str) -> list[Entry]:
    """Read a list.

    Args:
        url: of a ``.csv`` with the columns ``path`` and perhaps ``label``, or of a ``.jsonl`` with objects of these.

    Raises:
        ValueError: there is none, or it cannot be understood.
        OSError: it cannot be read.
    """
    if not storage.is_remote(url) and not Path(url).is_file():
        raise ValueError(f"{url}: there is no such list")
    try:
        rows = list(_entries(url, storage.read(url).decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except FileNotFoundError as error:
        raise ValueError(f"{url}: there is no such list") from error
    except csv.Error as error:
        raise ValueError(f"{url} is no CSV ({error}); write one image per line, as path,label") from error
    if not rows:
        raise ValueError(f"{url} lists no images; write one per line")
    return rows


def _entries(url: str, text: str) -> Iterator[Entry]:
    file = io.StringIO(text, newline="")
    if url.lower().endswith(".csv"):
        reader = csv.DictReader(file)
        if "path" not in (reader.fieldnames or ()):
            raise ValueError(
                f"{url}: the first line must name the columns, path and perhaps label; it is "
                f"{','.join(reader.fieldnames or ())!r}"
            )
        for row in reader:
            yield reader.line_num, row["path"] or "", row.get("label") or None
        return
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{url}, line {number} is no JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("path"), str):
            raise ValueError(f'{url}, line {number} must be an object like {{"path": "a.jpg", "label": 3}}')
        label = record.get("label")
        yield number, record["path"], None if label is None else str(label)
