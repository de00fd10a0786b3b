import time
from collections.abc import Iterator

import torch
from swav_testing.ranks import run_ranks

from swav.distributed import all_reduce_sum, rank
from swav_eval.rounds import in_rounds


def meetings(seconds_by_rank: tuple[float, ...], round_seconds: float) -> tuple[int, float]:
    """Steps that this rank has done, and for how long it waited at most between two of its meetings."""
    import swav_eval.rounds

    at: list[float] = []

    def any_rank(flag: bool) -> bool:
        at.append(time.monotonic())
        return bool(all_reduce_sum(torch.tensor([int(flag)])).item())

    vars(swav_eval.rounds)["any_rank"] = any_rank
    steps = []

    def work() -> Iterator[None]:
        for step in range(20):
            time.sleep(seconds_by_rank[rank()])
            steps.append(step)
            yield

    in_rounds(work(), round_seconds=round_seconds)
    return len(steps), len(at)


def test_a_rank_that_is_done_meets_the_others_while_they_work() -> None:
    found = run_ranks(2, meetings, (0.0, 0.02), 0.03)
    assert [steps for steps, _ in found] == [20, 20]
    assert found[0][1] == found[1][1] > 5  # of 0.4 s, in rounds of two steps


def test_alone_work_is_done_once() -> None:
    done: list[int] = []
    in_rounds(iter(map(done.append, range(5))))
    assert done == list(range(5))
    in_rounds(iter(()))
