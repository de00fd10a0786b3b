"""A pickle of NumPy arrays that detectron2's checkpointer loads into its ResNet, alone or inside a detector.

Its ``.pkl`` needs ``model`` and ``__author__``; ``matching_heuristics`` lets names match by their end, so that
``res2.0.conv1.weight`` finds ``backbone.bottom_up.res2.0.conv1.weight``. No author but Caffe2 has its names changed.
"""

import pickle

from swav.export.check import check_outputs, check_weights
from swav.export.publish import ALONE
from swav.export.state_dicts import refuse_other_networks
from swav.models.architecture import build
from swav.models.backbone_file import BackboneFile
from swav.models.detectron2_names import to_detectron2
from swav.models.layouts import find_backbone
from swav.models.weight_files import parse

_WHAT = "the file for detectron2"
_COUNTERS = "num_batches_tracked"  # detectron2's frozen norms have none


def for_detectron2(file: BackboneFile) -> tuple[dict[str, bytes], float]:
    """A file for detectron2.

    Returns:
        The file, and the largest difference of its features, computed under our names again.
    """
    refuse_other_networks(file, "detectron2")
    arrays = {
        to_detectron2(name): tensor.numpy()
        for name, tensor in file.backbone.state_dict().items()
        if not name.endswith(_COUNTERS)
    }
    data = pickle.dumps({"model": arrays, "__author__": "swav", "matching_heuristics": True}, protocol=3)
    # NumPy before 1.26 does not know the first name; all later ones know the second.
    data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
    weights = find_backbone(parse(data)[0]).weights
    check_weights(_WHAT, weights, file, without=_COUNTERS)
    return {ALONE: data}, check_outputs(_WHAT, build(file.model, weights).eval(), file, tolerance=0.0)
