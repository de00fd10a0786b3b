"""Check 6: all ranks run the same software on the same kind of GPU."""

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision

import swav
from swav.doctor.report import Facts, Finding, Member, differing, failed, judged, name_ranks, skipped
from swav.doctor.storage_check import describe

_MIN_FREE_GPU = 0.8  # of its memory, before the run has begun
_IMAGE_REMEDY = "give all pods the same image, by digest; delete pods that an earlier template made"
_GPU_REMEDY = "place the pods on one kind of node (node selector), with one driver"


def measure(device: torch.device) -> Facts:
    """What this rank runs, and its GPU."""
    facts: Facts = {
        "software": f"swav {swav.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"python {platform.python_version()}",
        "image": os.environ.get("SWAV_IMAGE", ""),
        "package": package_hash(Path(swav.__file__).parent)[:16],
        "errors": {},
    }
    if device.type == "cuda":
        try:
            facts |= _gpu(device)
        except RuntimeError as error:  # of CUDA
            facts["errors"]["identity.gpu"] = describe(error).splitlines()[0]
    return facts


def package_hash(folder: Path) -> str:
    """A digest of a package's source files: names and bytes, wherever it is installed."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _gpu(device: torch.device) -> Facts:
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    kind = f"{found.name}, compute capability {found.major}.{found.minor}, driver {_driver()}"
    return {"gpu": kind, "gpu_free_bytes": free, "gpu_total_bytes": total}


def _driver(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    try:
        numbers = re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", version.read_text().splitlines()[0])
    except (OSError, IndexError):
        return "unknown"
    return numbers[0] if numbers else "unknown"


def judge(told: Mapping[Member, Facts]) -> list[Finding]:
    """Findings of what all ranks told."""
    bad = failed("identity.software", told, "see that the image is whole")
    known = {member: facts for member, facts in told.items() if "software" in facts}
    if not known:
        return [bad or skipped("identity.software", "no rank told")]
    software, package, image = (
        {member: facts[key] for member, facts in known.items()} for key in ("software", "package", "image")
    )
    findings = [bad or differing("identity.software", software, remedy=_IMAGE_REMEDY)]
    findings.append(differing("identity.package", package, remedy=_IMAGE_REMEDY))
    if any(image.values()):
        named = {member: name or "(not set)" for member, name in image.items()}
        findings.append(differing("identity.image", named, remedy=_IMAGE_REMEDY))
    else:
        findings.append(skipped("identity.image", "SWAV_IMAGE is not set: not started from an image"))
    return findings + _gpu_findings(known)


def _gpu_findings(told: Mapping[Member, Facts]) -> list[Finding]:
    bad = failed("identity.gpu", told, "see that each rank has a GPU of its own, and nvidia-smi on that node")
    with_gpu = {member: facts for member, facts in told.items() if "gpu" in facts}
    if bad is not None or not with_gpu:
        first = bad or skipped("identity.gpu", "the preflight runs on CPUs")
        return [first, skipped("identity.gpu_memory", "see identity.gpu")]
    kinds = differing("identity.gpu", {m: facts.get("gpu", "none") for m, facts in told.items()}, remedy=_GPU_REMEDY)
    share = {member: facts["gpu_free_bytes"] / facts["gpu_total_bytes"] for member, facts in with_gpu.items()}
    remedy = f"{name_ranks([min(share, key=lambda m: share[m])])}: end what else runs on the GPU (nvidia-smi), or drain"
    least = 100 * min(share.values())
    return [
        kinds,
        judged("identity.gpu_memory", least, at_least=100 * _MIN_FREE_GPU, unit="% free", remedy=remedy),
    ]
