"""Reads files of weights without running what they may hold: torch's, safetensors', and pickles of NumPy arrays.

Damaged bytes make their decoders raise anything, assertions included, so every exception of one counts as damage.
"""

import argparse
import io
import json
import pickle
import re
import struct
import zipfile
from typing import Any

import safetensors.torch
import torch

from swav.models.array_pickles import Dtype, ForbiddenError, Scalar, load_arrays

_OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the number that files of torch before 1.6 begin with, pickled
# Settings and figures that training scripts keep beside their weights: plain values, none of which runs anything.
_PLAIN: list[Any] = [
    argparse.Namespace,
    (Dtype, "numpy.dtype"),
    (Scalar(), "numpy.core.multiarray.scalar"),
    (Scalar(), "numpy._core.multiarray.scalar"),
]
_PIECE_BYTES = 1 << 20


def parse(data: bytes) -> tuple[Any, dict[str, str]]:
    """Read the content of a file of weights, on the CPU.

    Args:
        data: the whole file. Its kind is told from its first bytes.

    Returns:
        What was saved, and the metadata of a safetensors file (empty for others).

    Raises:
        ValueError: the file is of no such kind, is damaged, or holds more than values; the message follows the file's
            name.
    """
    if data.startswith(b"PK\x03\x04"):
        _check_sums(data)
        return _torch(data), {}
    if data[4:9] == b"\0\0\0\0{":  # after a header's length in 8 bytes
        return _safetensors(data)
    if data.startswith(b"\x80"):
        return (_torch(data) if _OLD_TORCH in data[:64] else _arrays(data)), {}
    what = "is empty" if not data else "is not a file of weights: neither torch's, nor safetensors, nor a pickle"
    raise ValueError(f"{what}; docs/models.md names the layouts that are read")


def _check_sums(data: bytes) -> None:
    """Find damaged bytes, which torch does not look for; a file that was written without checksums has them as 0."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for part in archive.infolist():
                with archive.open(part) as stream:
                    while part.CRC and stream.read(_PIECE_BYTES):
                        pass
    except Exception as error:
        raise ValueError(f"is cut or damaged ({first_line(error)}); copy it again") from error


def _torch(data: bytes) -> Any:
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+) was not", str(error))
        if found is None:
            raise ValueError(f"is damaged, or holds more than weights ({first_line(error)})") from error
        raise ValueError(
            f"holds a {found[1]}, which is more than weights, and reading it could run any code. If you trust where it "
            "comes from, save its weights alone and give that file: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error
    except Exception as error:
        raise ValueError(
            f"is not a file of weights that torch can read ({first_line(error)}); copy it again"
        ) from error


def _safetensors(data: bytes) -> tuple[Any, dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
        (header_bytes,) = struct.unpack_from("<Q", data)
        metadata: dict[str, str] = json.loads(data[8 : 8 + header_bytes]).get("__metadata__", {})
        return tensors, metadata
    except Exception as error:
        raise ValueError(f"is not a whole safetensors file ({first_line(error)}); copy it again") from error


def _arrays(data: bytes) -> Any:
    try:
        return load_arrays(data)
    except ForbiddenError as error:
        raise ValueError(
            f"is a pickle that asks for {error}; of pickles only those of NumPy arrays are read (detectron2's .pkl), "
            "as others could run any code. Save the weights by torch.save, or as safetensors"
        ) from error
    except Exception as error:
        raise ValueError(f"is not a whole pickle of arrays ({first_line(error)}); copy it again") from error


def first_line(error: Exception) -> str:
    """The gist of an error, which may go on for a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
