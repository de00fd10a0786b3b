"""Sinkhorn-Knopp over the batch of all ranks (appendix A.1).

Shapes: A assign crops, B samples of this rank, K prototypes.
"""

import torch
from torch import Tensor

from swav.distributed import all_reduce_max, all_reduce_sum

# exp(-40) keeps every product of the iterations far inside fp32. Unit vectors with epsilon 0.05 span at most 40.
_LINEAR_RANGE = 40.0


@torch.no_grad()
def sinkhorn(scores_ABK: Tensor, *, epsilon: float, num_iters: int) -> Tensor:
    """Soft codes: scores turned into an equal partition of the global batch over the prototypes.

    The plan is never formed: it is M = exp((scores - max) / epsilon) scaled by one vector per prototype and one per
    sample, so an iteration is two matrix-vector products and one all-reduce of K sums for all assign crops together.
    The paper's division by the total, and its 1/K and 1/B, cancel in the codes. A fourth, tiny all-reduce finds the
    global maximum: any other shift that differs between ranks or samples would change the result. Autocast does not
    reach in here: its half-precision products would change the codes, or overflow.

    Args:
        scores_ABK: float [A, B, K], prototype scores of this rank's samples; B may differ between ranks.
        epsilon: weight of the entropy; where the scores span more than 40 epsilon, sums are taken over logarithms in
            float64, which neither underflows nor loses digits at epsilon = 0.001.
        num_iters: how often prototypes, then samples, are normalised.

    Returns:
        [A, B, K] whose rows sum to 1, in float32, or in float64 where the scores are.

    Raises:
        ValueError: epsilon is not positive, or there is no iteration.
        FloatingPointError: a score is not finite.
    """
    if epsilon <= 0 or num_iters < 1:
        raise ValueError(f"sinkhorn needs epsilon > 0 and num_iters >= 1, got {epsilon} and {num_iters}")
    scores_ABK = scores_ABK.detach().to(torch.promote_types(scores_ABK.dtype, torch.float32))
    highest_A, span = _range_over_ranks(scores_ABK)
    if not span < float("inf"):
        raise FloatingPointError("a prototype score is not finite")
    solve = _linear if span <= _LINEAR_RANGE * epsilon else _logarithmic
    with torch.autocast(scores_ABK.device.type, enabled=False):
        return solve(scores_ABK, highest_A, epsilon, num_iters)


def _range_over_ranks(scores_ABK: Tensor) -> tuple[Tensor, float]:
    """The global maximum per assign crop [A], and the widest span of scores within one."""
    both = torch.stack([scores_ABK.amax(dim=(1, 2)), -scores_ABK.amin(dim=(1, 2))])
    highest_A, negated_lowest_A = all_reduce_max(both)
    return highest_A, float((highest_A + negated_lowest_A).max())


def _linear(scores_ABK: Tensor, highest_A: Tensor, epsilon: float, num_iters: int) -> Tensor:
    matrix_ABK = (scores_ABK - highest_A[:, None, None]).div_(epsilon).exp_()
    sample_scale_AB1 = matrix_ABK.new_ones(*matrix_ABK.shape[:2], 1)
    for _ in range(num_iters):
        prototype_scale_AK1 = all_reduce_sum(matrix_ABK.mT @ sample_scale_AB1).reciprocal_()
        # One factor for all prototypes cancels in the codes, but it grows as (samples / prototypes) ** iterations. A
        # power of two is taken out without rounding.
        _, exponent_A11 = torch.frexp(prototype_scale_AK1.amax(dim=1, keepdim=True))
        prototype_scale_AK1 = torch.ldexp(prototype_scale_AK1, -exponent_A11)
        sample_scale_AB1 = (matrix_ABK @ prototype_scale_AK1).reciprocal_()
    return matrix_ABK.mul_(prototype_scale_AK1.mT).mul_(sample_scale_AB1)


def _logarithmic(scores_ABK: Tensor, highest_A: Tensor, epsilon: float, num_iters: int) -> Tensor:
    logits_ABK = (scores_ABK.double() - highest_A.double()[:, None, None]).div_(epsilon)
    sample_log_AB1 = logits_ABK.new_zeros(*logits_ABK.shape[:2], 1)
    for _ in range(num_iters):
        prototype_log_A1K = -_logsumexp_over_ranks(logits_ABK + sample_log_AB1)
        sample_log_AB1 = -torch.logsumexp(logits_ABK + prototype_log_A1K, dim=2, keepdim=True)
    return (logits_ABK + prototype_log_A1K).add_(sample_log_AB1).exp_().to(scores_ABK.dtype)


def _logsumexp_over_ranks(logits_ABK: Tensor) -> Tensor:
    """Log of the sum over all samples of all ranks, [A, 1, K]."""
    highest_A1K = all_reduce_max(logits_ABK.amax(dim=1, keepdim=True))
    return all_reduce_sum((logits_ABK - highest_A1K).exp_().sum(dim=1, keepdim=True)).log_() + highest_A1K


def harden(codes_ABK: Tensor) -> Tensor:
    """One-hot codes at the largest soft code (Table 9, right)."""
    return torch.zeros_like(codes_ABK).scatter_(-1, codes_ABK.argmax(dim=-1, keepdim=True), 1.0)
