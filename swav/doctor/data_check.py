"""Check 2: the data set can be opened, is the same on every rank, and its bytes are those that were indexed."""

import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import google_crc32c
import numpy as np

from swav.config import PretrainConfig
from swav.data.decode import decode_image
from swav.data.epochs import epoch_order
from swav.data.fetch import open_shard
from swav.data.index import DatasetIndex
from swav.doctor.report import Facts, Finding, Member, differing, failed, judged, skipped
from swav.doctor.storage_check import describe, rate

_NAMES = ("data.index", "data.read", "data.decode", "data.lanes")
_NUM_RANGES = 8  # of each rank
_RANGE_BYTES = 8_000_000  # as runtime.fetch_bytes
_NUM_THREADS = 4
_INDEX_REMEDY = "give --data as `python -m swav.data.index` takes it, where every pod reaches and may read it"
_READ_REMEDY = (
    "restore the shard, or index the data again; where the store refuses, see the role and the keys of the pods"
)


def open_facts(index: DatasetIndex, config: PretrainConfig | None, world_size: int) -> Facts:
    """What identifies a data set, and whether a run's order can feed this world."""
    facts: Facts = {
        "identity": index.identity,
        "samples": index.num_samples,
        "shards": index.num_shards,
        "bytes": index.num_bytes,
    }
    if config is not None:
        facts["lanes"] = config.num_lanes
        try:
            epoch_order(config, index, 0).check_world(world_size)
        except ValueError as error:
            facts["errors"] = {"data.lanes": str(error)}
    return facts


def read_facts(index: DatasetIndex) -> Facts:
    """Read some random byte ranges of random shards, past any cache, and compare every image in them; decode one."""
    draws = random.SystemRandom()
    samples = [draws.randrange(index.num_samples) for _ in range(_NUM_RANGES)]
    began = time.monotonic()
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = list(pool.map(lambda sample: _read_range(index, sample), samples))
    facts: Facts = {"seconds": time.monotonic() - began}
    facts |= {key: sum(part.get(key, 0) for part in parts) for key in ("bytes", "images", "verified")}
    errors = [part["error"] for part in parts if "error" in part]
    facts["errors"] = {"data.read": errors[0]} if errors else {}
    return facts | _decode_facts([part["image"] for part in parts if "image" in part], facts["errors"])


def _read_range(index: DatasetIndex, sample: int) -> Facts:
    """One range: rows from that of a sample on, until there are enough bytes."""
    number, first = index.locate_one(sample)
    url = index.shard_url(number)
    try:
        rows = np.asarray(index.rows(number))[first:]
        starts = rows["image_offset"].astype(np.int64)
        ends = starts + rows["image_bytes"]
        count = max(1, int(np.searchsorted(ends, starts[0] + _RANGE_BYTES, side="right")))
        start, end = int(starts[0]), int(ends[count - 1])
        data = open_shard(index, number).read(start, end - start)
        verified = 0
        for row in range(count):
            known = int(rows["image_crc32c"][row])
            image = data[int(starts[row]) - start : int(ends[row]) - start]
            if len(image) != ends[row] - starts[row] or (known and google_crc32c.value(image) != known):
                return {"error": f"reading {url}: sample {sample + row} is not what was indexed", "bytes": len(data)}
            verified += known != 0
    except (OSError, RuntimeError, ValueError) as error:
        return {"error": f"reading {url}: {describe(error)}"}
    first_image = data[: int(ends[0]) - start]
    return {"bytes": len(data), "images": count, "verified": verified, "image": (sample, first_image)}


def _decode_facts(images: list[tuple[int, bytes]], errors: dict[str, str]) -> Facts:
    """Decode the first image that can be: a run leaves a few broken ones out, so all have to be to stop it."""
    broken = ""
    for sample, image in images:
        began = time.monotonic()
        try:
            height, width, _ = decode_image(image).shape
        except (ValueError, MemoryError) as error:
            broken = broken or f"none of {len(images)} images can be decoded; sample {sample}: {describe(error)}"
            continue
        return {"decoded": f"{width}x{height} pixels", "decode_ms": 1000 * (time.monotonic() - began)}
    return {"errors": errors | {"data.decode": broken}} if broken else {}


def judge(told: Mapping[Member, Facts], *, min_read_mb_per_second: float | None, has_data: bool) -> list[Finding]:
    """Findings of what all ranks told, with ``open`` and ``read`` in each rank's facts."""
    if not has_data:
        return [skipped(name, "neither --data nor --recipe is given") for name in _NAMES]
    opened = {member: facts["open"] for member, facts in told.items() if "identity" in facts.get("open", {})}
    parts = {member: facts.get("open", {}) for member, facts in told.items()}
    findings = [failed("data.index", parts, _INDEX_REMEDY) or _index(opened)]
    read = {member: facts["read"] for member, facts in told.items() if facts.get("read")}
    if not read:
        return findings + [skipped(name, "the data set cannot be opened on any rank") for name in _NAMES[1:]]
    findings.append(failed("data.read", read, _READ_REMEDY) or _speed(read, min_read_mb_per_second))
    decoded = sorted({facts["decoded"] for facts in read.values() if "decoded" in facts})
    findings.append(
        failed("data.decode", read, "look at the images: docs/bad-input.md says which kinds are taken")
        or (
            Finding(name="data.decode", status="pass", measured=", ".join(decoded[:2]), limit="one image per rank")
            if decoded
            else skipped("data.decode", "no image could be read")
        )
    )
    return [*findings, _lanes(opened)]


def _index(opened: Mapping[Member, Facts]) -> Finding:
    values = {
        member: f"{facts['samples']} images, {facts['shards']} shards, {facts['identity'][:12]}"
        for member, facts in opened.items()
    }
    remedy = "let all pods see the same data: the same url, bucket, mount and version"
    return differing("data.index", values, remedy=remedy)


def _speed(read: Mapping[Member, Facts], limit: float | None) -> Finding:
    remedy = "look at the store and the network, or keep the data nearer"
    finding = judged("data.read", rate(list(read.values())), at_least=limit, unit="MB/s in all", remedy=remedy)
    images, verified = (sum(facts[key] for facts in read.values()) for key in ("images", "verified"))
    note = f"{verified} of {images} images compared by checksum"
    if verified < images:
        note += "; for the others, index the data with --checksums"
    return replace(finding, reason=note)


def _lanes(opened: Mapping[Member, Facts]) -> Finding:
    bad = failed("data.lanes", opened, "give the run fewer ranks, or more lanes")
    if bad is not None:
        return bad
    lanes = {facts["lanes"] for facts in opened.values() if "lanes" in facts}
    if not lanes:
        return skipped("data.lanes", "no --recipe is given")
    limit = "at least one per rank, a sample for each in every batch"
    return Finding(name="data.lanes", status="pass", measured=f"{max(lanes)} lanes", limit=limit)
