"""Reads pickles of NumPy arrays without NumPy's own unpickling, which a made-up dtype can lead into memory not its own.

Stand-ins take NumPy's place in the pickle; they hold values, and an array is made of them by its public functions.
"""

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_LATIN = {"latin1", "latin-1"}


class Dtype:
    """Stands for ``numpy.dtype``: of numbers alone."""

    __slots__ = ("dtype",)

    def __init__(self, text: object, *_: object) -> None:
        """Take the type's letter and size.

        Raises:
            ValueError: it is no type of numbers.
        """
        if text not in _DTYPES:
            raise ValueError(f"arrays of type {str(text)[:20]!r} are not read")
        self.dtype = np.dtype(str(text))

    def __setstate__(self, state: Any) -> None:
        """Take the order of bytes, the one thing that NumPy adds for numbers."""
        byte_order: Any = state[1]
        if byte_order not in ("<", ">", "|", "="):
            raise ValueError(f"the order of bytes {str(byte_order)[:20]!r} is not read")
        self.dtype = self.dtype.newbyteorder(byte_order)


class Array:
    """Stands for a ``numpy.ndarray`` that is being put together."""

    __slots__ = ("values",)

    def __setstate__(self, state: Any) -> None:
        """Take version, shape, dtype, whether columns come first, and bytes (text in pickles of Python 2)."""
        _, shape, dtype, columns_first, data = state
        self.values = _values(data, dtype, shape, "F" if columns_first else "C")


class _Reconstruct:
    __slots__ = ()

    def __call__(self, *_: object) -> Array:
        return Array()


class _FromBuffer:
    __slots__ = ()

    def __call__(self, data: Any, dtype: Dtype, shape: Any, order: Any) -> Array:
        array = Array()
        array.values = _values(data, dtype, shape, "F" if order == "F" else "C")
        return array


class Scalar:
    """Stands for ``numpy.core.multiarray.scalar``, which makes a number."""

    __slots__ = ()

    def __call__(self, dtype: Dtype, data: Any) -> Any:
        """The number, as Python has it."""
        return _values(data, dtype, (), "C").item()


class _Encode:
    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding not in _LATIN:
            raise ValueError(f"bytes in {encoding!r} are not read")
        return text.encode("latin1")


class _NoBytes:
    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


class _Kind:
    __slots__ = ()


class _Empty:
    __slots__ = ()

    def __call__(self) -> dict[Any, Any]:
        return {}


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy.core.multiarray", "scalar"): Scalar(),
    ("numpy._core.multiarray", "scalar"): Scalar(),
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy", "ndarray"): _Kind(),
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): _Encode(),
    ("__builtin__", "bytes"): _NoBytes(),
    ("collections", "OrderedDict"): _Empty(),
}


class ForbiddenError(Exception):
    """A pickle asks for something else than NumPy's arrays."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ForbiddenError(f"{module}.{name}")
        return _STAND_INS[module, name]


def load_arrays(data: bytes) -> Any:
    """Read a pickle of plain values and NumPy arrays, which come as tensors of their own.

    Raises:
        ForbiddenError: it asks for anything else.
        Exception: of any kind, where it is damaged.
    """
    return _with_tensors(_Unpickler(io.BytesIO(data), encoding="latin1").load())


def _values(data: Any, dtype: Dtype, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


def _with_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(item) for key, item in value.items()}
    return _tensor(value.values) if isinstance(value, Array) else value


def _tensor(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), order="C", copy=True))
