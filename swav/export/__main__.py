"""Writes a backbone in another program's format.

``python -m swav.export --backbone FILE --to {torchvision,timm,hub,detectron2,safetensors,onnx} --output PATH``
"""

import argparse
import sys

from swav.export.card import check_license, run_of
from swav.export.detectron2_pickle import for_detectron2
from swav.export.hub_folder import entry_name, for_hub
from swav.export.onnx_file import for_onnx
from swav.export.publish import check_place, publish
from swav.export.safetensors_folder import for_safetensors
from swav.export.state_dicts import for_timm, for_torchvision
from swav.logs import answer, start_logging
from swav.models.backbone_file import load_backbone, locate
from swav.program import run
from swav.storage import Location

# Formats, and how their files' names end; folders have no ending.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "torchvision": (".pth", ".pt"),
    "timm": (".pth", ".pt"),
    "hub": (),
    "detectron2": (".pkl",),
    "safetensors": (),
    "onnx": (".onnx",),
}


def export(backbone: Location, to: str, output: Location, *, license_id: str = "unknown") -> dict[str, object]:
    """Write a backbone in another format, once what was made of it computes the same.

    Args:
        backbone: a file or folder that :func:`swav.models.backbone_file.load_backbone` reads.
        to: the format.
        output: a file, or a folder for hub and safetensors, local or in a store.
        license_id: of the weights, for the model card of safetensors.

    Returns:
        What was written, by url, with SHA-256, and how far its features are from the backbone's.

    Raises:
        ValueError: the backbone cannot be read, the format has no such network, a package is missing, or something
            else is at the output.
        RuntimeError: what was made does not compute the same; nothing was written.
        OSError: a file cannot be read or written.
    """
    if to not in _ENDINGS:
        raise ValueError(f"--to {to} is unknown; formats are {', '.join(_ENDINGS)}")
    check_license(license_id)
    check_place(output, _ENDINGS[to])
    url = locate(backbone)
    file = load_backbone(url)
    facts: dict[str, object] = {}
    match to:
        case "torchvision":
            files, difference = for_torchvision(file)
        case "timm":
            files, difference = for_timm(file)
        case "detectron2":
            files, difference = for_detectron2(file)
        case "onnx":
            files, difference = for_onnx(file)
        case "hub":
            files, difference = for_hub(file)
            facts["entry"] = entry_name(file)
        case _:
            files, difference = for_safetensors(file, run_of(url, file), license_id=license_id)
    return {"to": to, "files": publish(files, output), "largest_difference": difference, **facts}


def main(arguments: list[str] | None = None) -> int:
    """Export from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m swav.export", description="Write a backbone in another program's format."
    )
    parser.add_argument("--backbone", required=True, help="backbone of any layout in docs/models.md, or a run's folder")
    parser.add_argument("--to", required=True, choices=list(_ENDINGS), help="the format")
    parser.add_argument("--output", required=True, help="file (hub, safetensors: folder), local or s3://")
    parser.add_argument("--license", default="unknown", help="of the weights, for the model card (default: unknown)")
    start_logging()

    def body() -> None:
        options = parser.parse_args(arguments)
        result = export(options.backbone, options.to, options.output, license_id=options.license)
        files = result["files"]
        assert isinstance(files, dict)
        lines = [f"{url}  sha256 {sha256}" for url, sha256 in files.items()]
        lines.append(f"read back and tried: features differ by {result['largest_difference']:.1e} of the largest")
        answer("\n".join(lines), title="exported", result=result)

    return run(body)


if __name__ == "__main__":
    sys.exit(main())
