"""SwAV's ablations: appendix C, Tables 8 to 10, with the global crops of appendix A.7.

Every run takes 400 epochs of 2x160 + 4x96 crops (appendix C.1): 19 h 20 on 64 V100 by Table 1; more prototypes take
longer, how much the paper does not say. Expected numbers are top-1 accuracies of a linear classifier on frozen
features.
"""

from dataclasses import replace

from swav.config import PretrainConfig, SinkhornConfig, SwavConfig
from swav.recipes.base import SIMCLR_SCALE, crops, large_batch


def _ablation(name: str, method: SwavConfig) -> PretrainConfig:
    return replace(large_batch(name, 400, crops(160, 4, scale=SIMCLR_SCALE)), method=method)


def swav_abl_400ep() -> PretrainConfig:
    """Tables 8, 9 and 10: the run that the others change in one thing. Expect 73.9."""
    return _ablation("swav_abl_400ep", SwavConfig())


def swav_abl_400ep_k300() -> PretrainConfig:
    """Table 8: 300 prototypes. Expect 72.8."""
    return _ablation("swav_abl_400ep_k300", SwavConfig(num_prototypes=300))


def swav_abl_400ep_k1000() -> PretrainConfig:
    """Table 8: 1000 prototypes. Expect 73.6."""
    return _ablation("swav_abl_400ep_k1000", SwavConfig(num_prototypes=1000))


def swav_abl_400ep_k10000() -> PretrainConfig:
    """Table 8: 10000 prototypes. Expect 74.1."""
    return _ablation("swav_abl_400ep_k10000", SwavConfig(num_prototypes=10000))


def swav_abl_400ep_k30000() -> PretrainConfig:
    """Table 8: 30000 prototypes. Expect 73.8."""
    return _ablation("swav_abl_400ep_k30000", SwavConfig(num_prototypes=30000))


def swav_abl_400ep_k100000() -> PretrainConfig:
    """Table 8: 100000 prototypes. Expect 73.8."""
    return _ablation("swav_abl_400ep_k100000", SwavConfig(num_prototypes=100000))


def swav_abl_400ep_fixed_prototypes() -> PretrainConfig:
    """Table 9 (left): random prototypes that are never updated. Expect 73.1."""
    return _ablation("swav_abl_400ep_fixed_prototypes", SwavConfig(learn_prototypes=False))


def swav_abl_400ep_hard() -> PretrainConfig:
    """Table 9 (right): each code rounded to its largest entry. Expect 73.3."""
    return _ablation("swav_abl_400ep_hard", SwavConfig(codes="hard"))


def swav_abl_400ep_sinkhorn1() -> PretrainConfig:
    """Table 10: one Sinkhorn iteration. Expect the loss not to converge ("fail")."""
    return _ablation("swav_abl_400ep_sinkhorn1", SwavConfig(sinkhorn=SinkhornConfig(num_iters=1)))


def swav_abl_400ep_sinkhorn10() -> PretrainConfig:
    """Table 10: ten Sinkhorn iterations. Expect 73.8."""
    return _ablation("swav_abl_400ep_sinkhorn10", SwavConfig(sinkhorn=SinkhornConfig(num_iters=10)))


def swav_abl_400ep_sinkhorn30() -> PretrainConfig:
    """Table 10: thirty Sinkhorn iterations. Expect 73.7."""
    return _ablation("swav_abl_400ep_sinkhorn30", SwavConfig(sinkhorn=SinkhornConfig(num_iters=30)))


RECIPES = (
    swav_abl_400ep,
    swav_abl_400ep_k300,
    swav_abl_400ep_k1000,
    swav_abl_400ep_k10000,
    swav_abl_400ep_k30000,
    swav_abl_400ep_k100000,
    swav_abl_400ep_fixed_prototypes,
    swav_abl_400ep_hard,
    swav_abl_400ep_sinkhorn1,
    swav_abl_400ep_sinkhorn10,
    swav_abl_400ep_sinkhorn30,
)
