"""An ONNX file: images of any number and size in, features out."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from swav.config import COLOUR_MEAN, COLOUR_STD
from swav.export.check import check_outputs, needed
from swav.export.publish import ALONE
from swav.models.backbone_file import BackboneFile

_MAX_BYTES = 2_000_000_000  # of a protobuf message, somewhat more
_TOLERANCE = 1e-4  # batch norm is folded into the convolutions, and another library multiplies
_TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir")
_AXES = {0: "batch", 2: "height", 3: "width"}


def for_onnx(file: BackboneFile) -> tuple[dict[str, bytes], float]:
    """A file for ONNX Runtime and others: ``images`` [batch, 3, height, width] -> ``features`` [batch, D], float32.

    Returns:
        The file, and the largest difference of its features, computed by ONNX Runtime.

    Raises:
        ValueError: a package is missing, or the backbone is larger than an ONNX file can be.
    """
    num_bytes = 4 * sum(parameter.numel() for parameter in file.backbone.parameters())
    if num_bytes > _MAX_BYTES:
        raise ValueError(
            f"an ONNX file holds at most 2 GB, and this backbone has {num_bytes / 1e9:.1f}; export it --to hub or "
            "--to safetensors"
        )
    onnx, runtime, _ = (needed(name, "onnx") for name in ("onnx", "onnxruntime", "onnxscript"))
    data = _converted(file).SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def compute(images: Tensor) -> Tensor:
        (features,) = session.run(["features"], {"images": images.numpy()})
        return torch.from_numpy(features)

    return {ALONE: data}, check_outputs("the ONNX file", compute, file, tolerance=_TOLERANCE)


def _converted(file: BackboneFile) -> Any:
    """The model as ONNX's message, without traces of this machine."""
    sample = torch.randn(2, 3, file.crop_px, file.crop_px)
    dynamic = dict.fromkeys(_AXES, torch.export.Dim.DYNAMIC)
    with _quiet():
        program = torch.onnx.export(
            file.backbone.eval(),
            (sample,),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": dynamic},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for axis, name in _AXES.items():
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.metadata_props[:]
    described = {**asdict(file.model), "resize_px": file.resize_px, "crop_px": file.crop_px}
    facts = {"swav": described, "mean": COLOUR_MEAN, "std": COLOUR_STD}
    for name, value in facts.items():
        model.metadata_props.add(key=name, value=json.dumps(value, sort_keys=True))
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says of its own steps; standard output is for our answer."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
