"""Learning rate as a pure function of the step."""

import math
from collections.abc import Sequence


def warmup_cosine(
    step: int, *, num_steps: int, warmup_steps: int, start_lr: float, base_lr: float, final_lr: float
) -> float:
    """Linear warm-up, then cosine decay (appendix A.1).

    The warm-up's last step has ``base_lr``, and so has the first step after it. The cosine would reach ``final_lr`` at
    step ``num_steps``, one past the last.

    Args:
        step: from 0.
        num_steps: steps of the whole run.
        warmup_steps: steps of the warm-up, 0 for none.
        start_lr: learning rate of step 0 where there is a warm-up of two steps or more.
        base_lr: learning rate after warm-up.
        final_lr: learning rate that the cosine tends to.
    """
    if step < warmup_steps:
        if warmup_steps == 1:
            return base_lr
        return start_lr + (base_lr - start_lr) * step / (warmup_steps - 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return final_lr + 0.5 * (base_lr - final_lr) * (1.0 + math.cos(math.pi * progress))


def cosine_factor(step: int, *, num_steps: int) -> float:
    """What the rate of a step is of the first one: a cosine that would reach zero at step ``num_steps`` (A.3)."""
    return warmup_cosine(step, num_steps=num_steps, warmup_steps=0, start_lr=1.0, base_lr=1.0, final_lr=0.0)


def steps_factor(step: int, *, drops: Sequence[int], factor: float) -> float:
    """What the rate of a step is of the first one: ``factor`` at some steps, again and again (appendices A.4 and A.5).

    Args:
        step: from 0.
        drops: the steps that are the first with a lower rate.
        factor: of every drop.
    """
    return float(factor ** sum(step >= drop for drop in drops))
