"""What a classifier's training says of itself: how far it is, and that it has diverged."""

import logging
import math
import time
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from swav import telemetry
from swav.bars import progress_bar
from swav.distributed import rank
from swav.logs import set_context
from swav_eval.config import FinetuneProtocol, LinearProtocol
from swav_eval.labelled_data import Batches, LabelledBatch

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RateGroup:
    """Parameters with a learning rate of their own."""

    setting: str  # that holds the rate, for messages
    base_lr: float
    parameters: list[nn.Parameter]


class DivergenceWatch:
    """Looks at each loss one step late, so that a GPU need not be waited for."""

    def __init__(self, groups: list[RateGroup], has_diverged: list[bool]) -> None:
        """Prepare.

        Args:
            groups: all that is trained; one for each head where there are several heads.
            has_diverged: of each head; is kept up to date.
        """
        self._groups, self._has_diverged = groups, has_diverged
        self._step = 0
        self._pending: Tensor | None = None

    def take(self, step: int, losses_H: Tensor) -> None:
        """Take note of a step's losses, and look at those of the step before."""
        self.check()
        self._step, self._pending = step, losses_H

    def check(self) -> None:
        """Look at the last losses.

        Raises:
            RuntimeError: no head has a finite one any more; says what to try.
        """
        if self._pending is not None:
            losses, self._pending = self._pending.tolist(), None
            self._note([not math.isfinite(loss) for loss in losses], f"a loss of {losses}")

    def finish(self) -> None:
        """Look at the last losses, and at the weights that the last step has made."""
        self.check()
        are_finite = [all(bool(p.isfinite().all()) for p in group.parameters) for group in self._groups]
        if len(self._has_diverged) == 1:
            are_finite = [all(are_finite)]
        self._note([not is_finite for is_finite in are_finite], "weights that are not finite")

    def _note(self, diverged: list[bool], what: str) -> None:
        known, num_heads = self._has_diverged, len(diverged)
        new = [number for number in range(num_heads) if diverged[number] and not known[number]]
        if not new:
            return
        for number in new:
            known[number] = True
        of_heads = [self._groups[number] for number in new] if num_heads > 1 else self._groups
        rates = ", ".join(f"{group.setting}={group.base_lr:g}" for group in of_heads)
        if all(known):
            raise RuntimeError(
                f"the training has diverged, with {what} at step {self._step}; give lower rates than {rates}"
            )
        _logger.warning("with %s the training has diverged at step %d; other rates go on", rates, self._step)


class Report:
    """Shows how far the training is."""

    def __init__(self, step: int, batches: Batches, protocol: LinearProtocol | FinetuneProtocol) -> None:
        epochs_done, rest = divmod(step, batches.num_steps)
        done = batches.num_samples * epochs_done + min(batches.num_samples, rest * protocol.global_batch)
        self._bar = progress_bar(
            total=batches.num_samples * protocol.epochs,
            initial=done,
            desc=protocol.name,
            unit=" images",
            unit_scale=True,
            disable=rank() != 0,
        )
        self._log_every_steps = protocol.runtime.log_every_steps
        self._since = time.monotonic()
        telemetry.begin_training(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self, step: int, epoch: int, losses_H: Tensor, batch: LabelledBatch) -> None:
        """Take note of a step that is done; the loss that is shown is the best head's."""
        now = time.monotonic()
        telemetry.step_done(step, epoch=epoch, num_images=len(batch.labels), seconds=now - self._since)
        self._since = now
        set_context(step=step, epoch=epoch)
        if step % self._log_every_steps == 0:
            loss = float(losses_H.nan_to_num(nan=math.inf).min())
            telemetry.show(loss=loss)
            self._bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", refresh=False)
        self._bar.update(batch.global_size)
