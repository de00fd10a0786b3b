"""The result of an evaluation as one JSON object: what came out, and all that is needed to get it again."""

import contextlib
import json
import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

import swav
from swav.storage import Location, read, stat, write_atomic
from swav_eval.config import Protocol
from swav_eval.recipes import settings_of

FORMAT = "swav.result/1"

# What makes two evaluations the same one.
_IDENTITY = ("format", "protocol", "settings", "backbone_sha256", "data_identities")

_PACKAGES = ("torchvision", "numpy", "pillow", "simplejpeg", "scikit-learn")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a protocol found."""

    metrics: dict[str, float]  # by name, shares in [0, 1]: top1, top5, map_11_point, knn_20, ...
    broken: dict[str, int]  # images that could not be decoded and are in no number, by "train" and "test"
    facts: dict[str, Any] = field(default_factory=dict)  # more of the protocol's own: subset, rates, classes, ...


def identity(protocol: Protocol, *, backbone_sha256: str, data: dict[str, str]) -> dict[str, Any]:
    """What tells an evaluation from another one.

    Args:
        protocol: with all its settings.
        backbone_sha256: of the backbone's file.
        data: identities of the images, by "train" and "test".

    Returns:
        A part of the result.
    """
    return {
        "format": FORMAT,
        "protocol": protocol.name,
        "settings": settings_of(protocol),
        "backbone_sha256": backbone_sha256,
        "data_identities": data,
    }


def versions() -> dict[str, str]:
    """Of what computes, decodes and resizes images, and fits SVMs."""
    known = {"swav": swav.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # scikit-learn is there for SVMs alone
            known[name] = metadata.version(name)
    return known


def finished_result(output: Location, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result that stands in ``output`` already; None where there is none.

    Args:
        output: file of the result.
        wanted: the evaluation's :func:`identity`.

    Raises:
        ValueError: it is another evaluation's, or no result.
    """
    if stat(output) is None:
        return None
    try:
        found: dict[str, Any] = json.loads(read(output))
        differing = [key for key in _IDENTITY if found[key] != wanted[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output} holds something else than a result; give another --output") from error
    if differing:
        raise ValueError(
            f"{output} holds the result of another evaluation ({', '.join(differing)} differ); give another "
            "--output, or remove it"
        )
    return found


def write_result(output: Location, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    write_atomic(output, text_of(result).encode())


def text_of(result: dict[str, Any]) -> str:
    """A result as it is printed and written."""
    return json.dumps(result, indent=2) + "\n"
