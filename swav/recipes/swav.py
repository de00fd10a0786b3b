"""SwAV's pretraining runs on ImageNet: appendices A.1, A.6, B.1 (Table 1, Fig. 2) and B.2 (Table 2).

Costs are the paper's: 64 V100 of 16 GB, mixed precision, hours from Table 1 scaled to the epochs. Expected numbers are
top-1 accuracies of a linear classifier on frozen features (appendix A.3); those that the supplement does not state are
marked as the main paper's.

Differs: the paper trains in fp16 with loss scaling (A.1); these runs use bf16, which has the range of fp32 and needs
none. ``runtime.precision=fp16`` is the paper's.
"""

from dataclasses import replace

from swav.config import PretrainConfig, QueueConfig
from swav.recipes.base import crops, large_batch, small_batch, wide


def swav_r50_2x224_100ep() -> PretrainConfig:
    """Table 1: SwAV without multi-crop. 4 h 09 on 64 V100, 8.6 GB each. The paper states no accuracy."""
    return large_batch("swav_r50_2x224_100ep", 100, crops(224, 0))


def swav_r50_2x160_4x96_100ep() -> PretrainConfig:
    """Table 1: cheap multi-crop. 4 h 50 on 64 V100, 8.5 GB each. The paper states no accuracy."""
    return large_batch("swav_r50_2x160_4x96_100ep", 100, crops(160, 4))


def swav_r50_2x224_6x96_100ep() -> PretrainConfig:
    """Table 1, Fig. 2. 6 h 15 on 64 V100, 12.8 GB each. Expect 72.1 (main paper)."""
    return large_batch("swav_r50_2x224_6x96_100ep", 100, crops(224, 6))


def swav_r50_2x224_6x96_200ep() -> PretrainConfig:
    """Fig. 2. 12 h 30 on 64 V100. Expect 73.9 (main paper)."""
    return large_batch("swav_r50_2x224_6x96_200ep", 200, crops(224, 6))


def swav_r50_2x224_6x96_400ep() -> PretrainConfig:
    """Fig. 2. 25 h on 64 V100. Expect 74.6 (main paper)."""
    return large_batch("swav_r50_2x224_6x96_400ep", 400, crops(224, 6))


def swav_r50_2x224_6x96_800ep() -> PretrainConfig:
    """Fig. 2, A.1: the paper's best ResNet-50. 50 h on 64 V100.

    Expect 75.3 (A.3); k-NN 59.2 with 20 neighbours and 55.8 with 200 (Table 7); transfers as in Table 3.
    """
    return large_batch("swav_r50_2x224_6x96_800ep", 800, crops(224, 6))


def swav_r50_2x224_400ep() -> PretrainConfig:
    """The method comparison without multi-crop. 16 h 36 on 64 V100. Expect 70.1 (main paper)."""
    return large_batch("swav_r50_2x224_400ep", 400, crops(224, 0))


def swav_r50_2x160_4x96_400ep() -> PretrainConfig:
    """The method comparison with multi-crop. 19 h 20 on 64 V100. Expect 74.1 (main paper).

    Crops of A.2; ``swav_abl_400ep`` is the same run with the crops of A.7.
    """
    return large_batch("swav_r50_2x160_4x96_400ep", 400, crops(160, 4))


def swav_r50w2_2x224_4x96_400ep() -> PretrainConfig:
    """Table 2. 128 GPUs, time not stated. Expect 77.3.

    93.9 M parameters; Table 2's 188 M is not right. Head of 8192 units: the paper does not state one.
    """
    return wide("swav_r50w2_2x224_4x96_400ep", 2, head_hidden=8192)


def swav_r50w4_2x224_4x96_400ep_bs2560() -> PretrainConfig:
    """Table 2. 64 GPUs, time not stated. Expect 77.9. The learning rate stays 4.8: "all other" settings are A.1's."""
    return wide(
        "swav_r50w4_2x224_4x96_400ep_bs2560",
        4,
        head_hidden=8192,
        global_batch=2560,
        queue=QueueConfig(num_samples=2560, start_epoch=0),
    )


def swav_r50w5_2x224_4x96_400ep_bs1536() -> PretrainConfig:
    """Table 2. 128 GPUs, time not stated. Expect 78.5. The learning rate stays 4.8: "all other" settings are A.1's."""
    return wide(
        "swav_r50w5_2x224_4x96_400ep_bs1536",
        5,
        head_hidden=10240,
        head_batch_norm=False,
        global_batch=1536,
        queue=QueueConfig(num_samples=1536, start_epoch=0),
    )


def swav_r50_2x160_4x96_200ep_bs256() -> PretrainConfig:
    """A.6. About 620 V100 hours (Table 1 scaled), on 4 GPUs in the main paper. Expect 72.0 (main paper)."""
    return small_batch("swav_r50_2x160_4x96_200ep_bs256", 200, crops(160, 4))


def swav_r50_2x224_6x96_200ep_bs256() -> PretrainConfig:
    """A.6. About 800 V100 hours (Table 1 scaled), on 4 GPUs in the main paper. Expect 72.7 (the authors' release)."""
    return small_batch("swav_r50_2x224_6x96_200ep_bs256", 200, crops(224, 6))


def swav_r50_2x224_6x96_400ep_bs256() -> PretrainConfig:
    """A.6. About 1600 V100 hours (Table 1 scaled), on 4 GPUs in the main paper. Expect 74.3 (main paper)."""
    return small_batch("swav_r50_2x224_6x96_400ep_bs256", 400, crops(224, 6))


def swav_r50_2x224_6x96_ig1b() -> PretrainConfig:
    """B.5, Table 6: a billion images of which no pass need ever be finished. An epoch here is 1,281,167 images.

    Everything in epochs (length, warm-up, freezing, schedule) is so in images: 800 times ImageNet's size, 1.02 billion.
    Differs: B.5 states neither crops nor length nor batch; these are those of the best run on ImageNet. Expect, after
    fine-tuning ImageNet with 13 and 128 images per class, top-1 38.2 and 64.7 (Table 6, which B.5 calls Table 5).
    """
    run = large_batch("swav_r50_2x224_6x96_ig1b", 800, crops(224, 6))
    return replace(run, data=replace(run.data, epoch_images=1_281_167))


RECIPES = (
    swav_r50_2x224_6x96_ig1b,
    swav_r50_2x224_100ep,
    swav_r50_2x160_4x96_100ep,
    swav_r50_2x224_6x96_100ep,
    swav_r50_2x224_6x96_200ep,
    swav_r50_2x224_6x96_400ep,
    swav_r50_2x224_6x96_800ep,
    swav_r50_2x224_400ep,
    swav_r50_2x160_4x96_400ep,
    swav_r50w2_2x224_4x96_400ep,
    swav_r50w4_2x224_4x96_400ep_bs2560,
    swav_r50w5_2x224_4x96_400ep_bs1536,
    swav_r50_2x160_4x96_200ep_bs256,
    swav_r50_2x224_6x96_200ep_bs256,
    swav_r50_2x224_6x96_400ep_bs256,
)
