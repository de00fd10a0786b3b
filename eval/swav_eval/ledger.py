"""Every number of the paper's tables: where it stands, and which pretraining and which protocol give it.

Tables and figures are the supplement's. Numbers of the main paper, and of others' papers where they are what a recipe
should give, come last. Imports without torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

# What a number is of, where no protocol of swav_eval.recipes measures it.
MEASUREMENTS = {
    "pretraining_hours": "wall clock of the pretraining itself, which metrics.jsonl has",
    "peak_memory": "largest memory of a GPU in pretraining, which metrics.jsonl has",
    "parameters": "of the backbone, which the recipe's model has",
    "convergence": "whether the loss of pretraining falls",
}
NOT_BUILT = {
    "faster_rcnn_voc0712": "Faster R-CNN on VOC07+12 (A.5)",
    "detr_coco": "DETR on COCO (A.5)",
}
# Why a number has no pretraining recipe of ours.
OTHERS = "other authors' model, not rebuilt here"

Value = float | str | None


@dataclass(frozen=True, slots=True)
class Reported:
    """One number.

    Attributes:
        table: where it stands.
        row: its row there.
        column: its column there.
        value: as printed, in per cent where it is a share; None where the paper names the run and no number.
        unit: of the value: %, h, GB, M; empty where it is printed with it.
        pretraining: name of the recipe; None: not by this project, see :data:`OTHERS`.
        protocol: name of the protocol, of a measurement, or of one that is not built yet.
        metric: of the protocol's result.
    """

    table: str
    row: str
    column: str
    value: Value
    unit: str
    pretraining: str | None
    protocol: str
    metric: str


_BEST = "swav_r50_2x224_6x96_800ep"
_SUPERVISED = "supervised_r50_1x224_100ep_bs256"
_MOCOV2 = "mocov2_r50_2x224_800ep_bs256"
_SIMCLR = "simclr_r50_2x224_1000ep"
_ABLATION = "swav_abl_400ep"
_INSTAGRAM = "swav_r50_2x224_6x96_ig1b"


def ledger() -> list[Reported]:
    """All numbers, in the paper's order."""
    return [
        *_table_1(),
        *_figure_2(),
        *_table_2(),
        *_table_3(),
        *_table_4(),
        *_table_5(),
        *_table_6(),
        *_table_7(),
        *_ablations(),
        *_main_paper(),
    ]


def _table_1() -> Iterator[Reported]:
    """Computational cost of 100 epochs on 64 V100 of 16 GB."""
    for method, crops, hours, memory, recipe in (
        ("SimCLR", "2x224", "4h00", 8.6, "simclr_r50_2x224_100ep"),
        ("SwAV", "2x224", "4h09", 8.6, "swav_r50_2x224_100ep"),
        ("SwAV", "2x160 + 4x96", "4h50", 8.5, "swav_r50_2x160_4x96_100ep"),
        ("SwAV", "2x224 + 6x96", "6h15", 12.8, "swav_r50_2x224_6x96_100ep"),
    ):
        row = f"{method}, {crops}"
        yield Reported("Table 1", row, "time / 100 epochs", hours, "", recipe, "pretraining_hours", "hours")
        yield Reported("Table 1", row, "peak memory / GPU", memory, "GB", recipe, "peak_memory", "gigabytes")


def _figure_2() -> Iterator[Reported]:
    """What the text states of the figure; its points at 100 to 400 epochs are the main paper's."""
    yield _top1("Figure 2", "SwAV, 800 epochs", 75.3, _BEST)
    yield Reported("Figure 2", "SwAV, 100 epochs", "hours", 6, "h", "swav_r50_2x224_6x96_100ep", *_HOURS)
    yield Reported("Figure 2", "SimCLR, 1000 epochs", "hours", 40, "h", _SIMCLR, *_HOURS)


_HOURS = ("pretraining_hours", "hours")


def _table_2() -> Iterator[Reported]:
    """Larger architectures: linear classifiers on frozen features."""
    for row, millions, top1, recipe in (
        ("Supervised, EffNet-B7", 66, 84.4, None),
        ("Rotation, RevNet50-4w", 86, 55.4, None),
        ("BigBiGAN, RevNet50-4w", 86, 61.3, None),
        ("AMDIM, Custom-RN", 626, 68.1, None),
        ("CMC, R50-w2", 188, 68.4, None),
        ("MoCo, R50-w4", 375, 68.6, None),
        ("CPC v2, R161", 305, 71.5, None),
        ("SimCLR, R50-w4", 375, 76.8, None),
        ("SwAV, R50-w2", 188, 77.3, "swav_r50w2_2x224_4x96_400ep"),
        ("SwAV, R50-w4", 375, 77.9, "swav_r50w4_2x224_4x96_400ep_bs2560"),
        ("SwAV, R50-w5", 586, 78.5, "swav_r50w5_2x224_4x96_400ep_bs1536"),
    ):
        yield Reported("Table 2", row, "Param.", millions, "M", recipe, "parameters", "millions")
        yield _top1("Table 2", row, top1, recipe)


_TRANSFER = {
    "Places205": ("linear_places205", "top1"),
    "VOC07": ("svm_voc07", "map_11_point"),
    "iNat18": ("linear_inat18", "top1"),
    "VOC07+12 (Faster R-CNN)": ("faster_rcnn_voc0712", "ap50"),
    "COCO (DETR)": ("detr_coco", "ap"),
}


def _table_3() -> Iterator[Reported]:
    """Transfer: three linear classifiers, two detectors."""
    for row, recipe, values in (
        ("Supervised", _SUPERVISED, (53.2, 87.5, 46.7, 81.3, 40.8)),
        ("RotNet", None, (45.0, 64.6, None, None, None)),
        ("NPID++", None, (46.4, 76.6, 32.4, 79.1, None)),
        ("MoCo", None, (46.9, 79.8, 31.5, 81.5, None)),
        ("PIRL", None, (49.8, 81.1, 34.1, 80.7, None)),
        ("PCL", None, (49.8, 84.0, None, None, None)),
        ("BoWNet", None, (51.1, 79.3, None, 81.3, None)),
        ("SimCLR", _SIMCLR, (53.3, 86.4, 36.2, None, None)),
        ("MoCov2", _MOCOV2, (52.9, 87.1, 38.9, 82.5, 42.0)),
        ("SwAV", _BEST, (56.7, 88.9, 48.6, 82.6, 42.1)),
    ):
        for (column, measure), value in zip(_TRANSFER.items(), values, strict=True):
            if value is not None:
                yield Reported("Table 3", row, column, value, "%", recipe, *measure)


def _table_4() -> Iterator[Reported]:
    """Detection on VOC07+12."""
    for row, recipe, values in (
        ("Supervised", _SUPERVISED, (53.5, 81.3, 58.8)),
        ("Random", "random_r50", (28.1, 52.5, 26.2)),
        ("NPID++", None, (52.3, 79.1, 56.9)),
        ("PIRL", None, (54.0, 80.7, 59.7)),
        ("BoWNet", None, (55.8, 81.3, 61.1)),
        ("MoCov1", None, (55.9, 81.5, 62.6)),
        ("MoCov2", _MOCOV2, (57.4, 82.5, 64.0)),
        ("SwAV", _BEST, (56.1, 82.6, 62.7)),
    ):
        for column, metric, value in zip(("AP all", "AP50", "AP75"), ("ap", "ap50", "ap75"), values, strict=True):
            yield Reported("Table 4", row, column, value, "%", recipe, "faster_rcnn_voc0712", metric)


def _table_5() -> Iterator[Reported]:
    """Detection on COCO."""
    columns = ("AP", "AP50", "AP75", "APS", "APM", "APL")
    for row, recipe, values in (
        ("ImageNet labels", _SUPERVISED, (40.8, 61.2, 42.9, 20.1, 44.5, 60.3)),
        ("MoCo-v2", _MOCOV2, (42.0, 62.7, 44.4, 20.8, 45.6, 60.9)),
        ("SwAV", _BEST, (42.1, 63.1, 44.5, 19.7, 46.3, 60.9)),
    ):
        for column, value in zip(columns, values, strict=True):
            yield Reported("Table 5", row, column, value, "%", recipe, "detr_coco", column.lower())


def _table_6() -> Iterator[Reported]:
    """Low-shot learning on ImageNet."""
    for row, recipe, values, suffix in (
        ("No pretraining", "random_r50", (25.4, 48.4, 56.4, 80.4), "_scratch"),
        ("SwAV IG-1B", _INSTAGRAM, (38.2, 67.1, 64.7, 87.2), ""),
    ):
        columns = [(number, metric) for number in (13, 128) for metric in ("top1", "top5")]
        for (number, metric), value in zip(columns, values, strict=True):
            yield Reported(
                "Table 6", row, f"{number}, {metric}", value, "%", recipe, f"lowshot_{number}{suffix}", metric
            )


def _table_7() -> Iterator[Reported]:
    """k-NN on ImageNet."""
    for row, recipe, values in (
        ("NPID", None, (None, 46.5)),
        ("LA", None, (None, 49.4)),
        ("PCL", None, (54.5, None)),
        ("SwAV", _BEST, (59.2, 55.8)),
    ):
        for k, value in zip((20, 200), values, strict=True):
            if value is not None:
                yield Reported("Table 7", row, f"{k}-NN", value, "%", recipe, f"knn_{k}", f"knn_{k}")


def _ablations() -> Iterator[Reported]:
    """Tables 8 to 10: each changes one thing of the same run."""
    for number, top1 in ((300, 72.8), (1000, 73.6), (3000, 73.9), (10_000, 74.1), (30_000, 73.8), (100_000, 73.8)):
        recipe = _ABLATION if number == 3000 else f"{_ABLATION}_k{number}"
        yield _top1("Table 8", f"{number} prototypes", top1, recipe)
    yield _top1("Table 9", "learned prototypes", 73.9, _ABLATION)
    yield _top1("Table 9", "fixed prototypes", 73.1, f"{_ABLATION}_fixed_prototypes")
    yield _top1("Table 9", "soft assignment", 73.9, _ABLATION)
    yield _top1("Table 9", "hard assignment", 73.3, f"{_ABLATION}_hard")
    one = f"{_ABLATION}_sinkhorn1"
    yield Reported("Table 10", "1 Sinkhorn iteration", "top1", "fail", "", one, "convergence", "converges")
    yield _top1("Table 10", "3 Sinkhorn iterations", 73.9, _ABLATION)
    yield _top1("Table 10", "10 Sinkhorn iterations", 73.8, f"{_ABLATION}_sinkhorn10")
    yield _top1("Table 10", "30 Sinkhorn iterations", 73.7, f"{_ABLATION}_sinkhorn30")


def _main_paper() -> Iterator[Reported]:
    """What the supplement builds upon: the main paper's, or said otherwise."""
    release, mocov2 = "The authors' release", "MoCo-v2's paper"
    for table, row, top1, recipe in (
        ("Main paper", "SwAV, 2x224 + 6x96, 100 epochs", 72.1, "swav_r50_2x224_6x96_100ep"),
        ("Main paper", "SwAV, 2x224 + 6x96, 200 epochs", 73.9, "swav_r50_2x224_6x96_200ep"),
        ("Main paper", "SwAV, 2x224 + 6x96, 400 epochs", 74.6, "swav_r50_2x224_6x96_400ep"),
        ("Main paper", "Supervised", 76.5, _SUPERVISED),
        ("Main paper", "SimCLR, 2x224, 400 epochs", None, "simclr_r50_2x224_400ep"),
        ("Main paper", "SimCLR, 2x160 + 4x96, 400 epochs", None, "simclr_r50_2x160_4x96_400ep"),
        ("Main paper", "SeLa-v2, 2x224, 400 epochs", 67.2, "selav2_r50_2x224_400ep"),
        ("Main paper", "SeLa-v2, 2x160 + 4x96, 400 epochs", 71.8, "selav2_r50_2x160_4x96_400ep"),
        ("Main paper", "DeepCluster-v2, 2x224, 400 epochs", 70.2, "deepclusterv2_r50_2x224_400ep"),
        ("Main paper", "DeepCluster-v2, 2x160 + 4x96, 400 epochs", 74.3, "deepclusterv2_r50_2x160_4x96_400ep"),
        ("Main paper", "SwAV, 2x224, 400 epochs", 70.1, "swav_r50_2x224_400ep"),
        ("Main paper", "SwAV, 2x160 + 4x96, 400 epochs", 74.1, "swav_r50_2x160_4x96_400ep"),
        ("Main paper", "SwAV, 2x160 + 4x96, 256 images, 200 epochs", 72.0, "swav_r50_2x160_4x96_200ep_bs256"),
        ("Main paper", "SwAV, 2x224 + 6x96, 256 images, 400 epochs", 74.3, "swav_r50_2x224_6x96_400ep_bs256"),
        (release, "SwAV, 2x224 + 6x96, 256 images, 200 epochs", 72.7, "swav_r50_2x224_6x96_200ep_bs256"),
        (release, "DeepCluster-v2, 2x224 + 6x96, 800 epochs", 75.2, "deepclusterv2_r50_2x224_6x96_800ep"),
        (mocov2, "MoCo-v2, 200 epochs", 67.5, "mocov2_r50_2x224_200ep_bs256"),
        (mocov2, "MoCo-v2, 800 epochs", 71.1, _MOCOV2),
        ("Appendix D.2", "DeepCluster-v2, one crop", None, "deepclusterv2_r50_1x224_400ep"),
        ("Appendix D.2", "SeLa-v2, one crop", None, "selav2_r50_1x224_400ep"),
    ):
        yield _top1(table, row, top1, recipe)
    for protocol, column, values in (
        ("semisup_1pct", "1 % of the labels", (53.9, 78.5)),
        ("semisup_10pct", "10 % of the labels", (70.2, 89.9)),
    ):
        for metric, value in zip(("top1", "top5"), values, strict=True):
            yield Reported("Main paper", "SwAV", f"{column}, {metric}", value, "%", _BEST, protocol, metric)


def _top1(table: str, row: str, value: float | None, recipe: str | None) -> Reported:
    """An accuracy of a linear classifier on ImageNet."""
    return Reported(table, row, "top1", value, "%", recipe, "linear_imagenet", "top1")
