import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from swav.models.array_pickles import ForbiddenError, load_arrays


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i4", "i8", "u1", "b1", ">f4"])
def test_arrays_come_as_equal_tensors(kind: str, protocol: int) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(kind)
    arrays = {
        "plain": values,
        "columns first": np.asfortranarray(values),
        "a part": values[:, ::2],
        "none": values[:0],
        "one": np.array(values[1, 1, 1]),
    }
    found = load_arrays(pickle.dumps(OrderedDict(arrays), protocol=protocol))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert torch.equal(found[name], torch.tensor(array.astype(array.dtype.newbyteorder("="))))
        assert found[name].is_contiguous()
        found[name].zero_()  # its own memory, which can be written


def test_numbers_of_numpy_come_as_those_of_python() -> None:
    assert load_arrays(pickle.dumps({"accuracy": np.float64(0.5), "step": np.int64(3)})) == {"accuracy": 0.5, "step": 3}


def test_text_and_plain_values_stay() -> None:
    plain = {"model": {"a": [1, 2.5, None, True]}, "__author__": "swav", "blob": b"12"}
    assert load_arrays(pickle.dumps(plain, protocol=2)) == plain


@pytest.mark.parametrize(
    "value", [np.array([{}], dtype=object), np.array(["a"]), np.zeros(2, "c8"), np.zeros(2, "f4,i4")]
)
def test_arrays_of_other_than_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"arrays of type '.*' are not read"):
        load_arrays(pickle.dumps(value))


@pytest.mark.parametrize("value", [print, torch.zeros(1), np.random.default_rng(0), io.BytesIO])
def test_anything_else_is_forbidden(value: Any) -> None:
    with pytest.raises(ForbiddenError):
        load_arrays(pickle.dumps(value))


def test_a_stand_in_cannot_be_changed_by_a_pickle() -> None:
    for name in (b"_codecs\nencode", b"numpy.core.multiarray\n_reconstruct", b"numpy\ndtype", b"numpy\nndarray"):
        for state in (b"}(S'a'\nI1\nu", b"(N}(S'__call__'\nI1\nut"):
            with pytest.raises((AttributeError, TypeError, ValueError, pickle.UnpicklingError)):
                load_arrays(b"\x80\x02c" + name + b"\n" + state + b"b.")
    test_numbers_of_numpy_come_as_those_of_python()


def test_a_dtype_that_lies_changes_nothing_of_numpy() -> None:
    """NumPy's own unpickling would take these flags, and follow the array's bytes as pointers."""
    lie = b"\x80\x02cnumpy\ndtype\n(S'f4'\nI00\nI00\ntR(I3\nS'<'\nNNNI-1\nI-1\nI63\ntb."
    load_arrays(lie)
    assert np.dtype("f4").flags == 0
