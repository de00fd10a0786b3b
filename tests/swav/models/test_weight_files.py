import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from swav.models.weight_files import parse

WEIGHTS = {"conv1.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}


def saved(content: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()


def arrays(protocol: int) -> bytes:
    return pickle.dumps({"model": {name: tensor.numpy() for name, tensor in WEIGHTS.items()}}, protocol=protocol)


KINDS = {
    "zip": saved({"model": WEIGHTS}),
    "old": saved({"model": WEIGHTS}, _use_new_zipfile_serialization=False),
    "zip without checksums": b"",
    **{f"pickle {protocol}": arrays(protocol) for protocol in range(2, 6)},
}
torch.serialization.set_crc32_options(False)
KINDS["zip without checksums"] = saved({"model": WEIGHTS})
torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_told_from_its_content(kind: str) -> None:
    content, metadata = parse(KINDS[kind])
    assert metadata == {}
    assert content["model"].keys() == WEIGHTS.keys()
    assert all(torch.equal(content["model"][name], tensor) for name, tensor in WEIGHTS.items())


def test_safetensors_come_with_their_metadata() -> None:
    content, metadata = parse(safetensors.torch.save(WEIGHTS, metadata={"format": "pt", "note": "x"}))
    assert metadata == {"format": "pt", "note": "x"}
    assert all(torch.equal(content[name], tensor) for name, tensor in WEIGHTS.items())
    assert parse(safetensors.torch.save(WEIGHTS))[1] == {}


@pytest.mark.parametrize("kind", [*KINDS, "safetensors"])
def test_a_file_cut_anywhere_is_refused(kind: str) -> None:
    data = safetensors.torch.save(WEIGHTS) if kind == "safetensors" else KINDS[kind]
    for end in range(0, len(data) - 1, max(1, len(data) // 60)):
        with pytest.raises(ValueError, match=r"^(is|holds) ") as caught:
            parse(data[:end])
        assert "\n" not in str(caught.value)


def test_a_rotten_byte_in_a_zip_is_found() -> None:
    data = KINDS["zip"]
    place = data.index(WEIGHTS["conv1.weight"].numpy().tobytes())
    with pytest.raises(
        ValueError, match=r"damaged \(BadZipFile: Bad CRC-32 for file 'archive/data/0'\); copy it again"
    ):
        parse(data[: place + 5] + b"\xff" + data[place + 6 :])


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_nothing_in_a_file_is_run(tmp_path: Path, kind: str) -> None:
    content = {"model": WEIGHTS, "extra": Evil(tmp_path / "was here")}
    data = {
        "zip": lambda: saved(content),
        "old": lambda: saved(content, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps({"model": Evil(tmp_path / "was here")}),
    }[kind]()
    with pytest.raises(ValueError, match="could run any code") as caught:
        parse(data)
    assert not (tmp_path / "was here").exists()
    remedy = (
        "by torch.save, or as safetensors" if kind == "pickle" else "torch.load.FILE, weights_only=False.*state_dict"
    )
    assert caught.match(remedy)


def test_tensors_in_a_plain_pickle_and_objects_in_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"asks for torch\._utils\._rebuild_tensor_v2"):
        parse(pickle.dumps({"model": WEIGHTS}, protocol=2))
    with pytest.raises(
        ValueError, match=r"is not a whole pickle of arrays .ValueError: arrays of type 'O8' are not read"
    ):
        parse(pickle.dumps({"model": np.array([{}], dtype=object)}))


def test_a_safetensors_header_that_lies_is_refused() -> None:
    for header_bytes in (0, 3, 2**20, 2**32 - 1):
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            parse(struct.pack("<Q", header_bytes) + b"{}" + bytes(20))
