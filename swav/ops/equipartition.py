"""Sinkhorn-Knopp over a whole data set, by passes over blocks (appendix D.2, SeLa-v2).

The plan has a row for every sample and is never formed: all that is kept between passes is one scale per prototype. A
sample's own scale follows from those, so its row always sums to 1, and what is left to converge are the prototypes'
sums, which shall all be N / K. Sums are kept as whole numbers, so any split of the blocks over workers, in any order,
gives the same scales to the bit.

Shapes: B samples of a block, N of the data set, K prototypes.
"""

import math

import torch
from torch import Tensor

# A sample adds 1 in all, so that the sums of 2^30 samples fit 64 bits; a block's part is rounded to 2^-32.
SUM_UNIT = 2.0**32


@torch.no_grad()
def prototype_sums(scores_BK: Tensor, log_scales_K: Tensor, *, epsilon: float) -> Tensor:
    """What a block's samples give to each prototype.

    Args:
        scores_BK: floating point [B, K], cosines of samples and prototypes; exponentials are taken in this precision.
        log_scales_K: float64 [K], from :func:`next_log_scales`, at first zeros.
        epsilon: weight of the entropy; SeLa's lambda at a softmax temperature t is epsilon = t / lambda.

    Returns:
        int64 [K], in units of 2^-32; add them up over blocks and workers.
    """
    logits = scores_BK / epsilon + log_scales_K.to(scores_BK.dtype)
    assigned = torch.softmax(logits, dim=1).sum(dim=0, dtype=torch.float64)
    return (assigned * SUM_UNIT).round_().long()


@torch.no_grad()
def next_log_scales(log_scales_K: Tensor, sums_K: Tensor, num_samples: int) -> tuple[Tensor, float]:
    """Scale every prototype to an equal share of the samples.

    Args:
        log_scales_K: float64 [K], that the sums were made with.
        sums_K: int64 [K], the sums of :func:`prototype_sums` over all samples.
        num_samples: N.

    Returns:
        The next scales, float64 [K], with mean 0, and the error of those that were given: the largest relative
        deviation of a prototype's sum from N / K. The samples' own sums are exact.
    """
    share = num_samples / len(sums_K)
    sums = sums_K.double() / SUM_UNIT
    error = float((sums / share - 1).abs().max())
    scales = log_scales_K + math.log(share) - sums.clamp_min(1 / SUM_UNIT).log()  # one that nobody chose comes near
    return scales - scales.mean(), error


@torch.no_grad()
def equal_labels(scores_BK: Tensor, log_scales_K: Tensor, *, epsilon: float) -> Tensor:
    """The prototype that each sample is assigned to most, the first one among equals.

    Args:
        scores_BK: as for :func:`prototype_sums`.
        log_scales_K: float64 [K], converged.
        epsilon: as for :func:`prototype_sums`.

    Returns:
        int64 [B].
    """
    return (scores_BK / epsilon + log_scales_K.to(scores_BK.dtype)).argmax(dim=1)
