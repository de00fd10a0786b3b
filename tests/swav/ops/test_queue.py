import torch

from swav.ops.queue import FeatureQueue


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values)[None, :, None]


def test_first_in_first_out_with_batches_that_do_not_divide_it() -> None:
    queue = FeatureQueue(1, 5, 1)
    for batch in [rows(1, 2), rows(3, 4), rows(5, 6)]:
        assert not queue.is_full
        queue.push(batch)
    assert queue.is_full
    assert queue.embeddings.flatten().tolist() == [2, 3, 4, 5, 6]
    queue.push(rows(7, 8, 9, 10, 11, 12, 13))
    assert queue.embeddings.flatten().tolist() == [9, 10, 11, 12, 13]


def test_state_dict_holds_what_is_needed_to_go_on() -> None:
    queue = FeatureQueue(1, 4, 1)
    queue.push(rows(1, 2, 3))
    restored = FeatureQueue(1, 4, 1)
    restored.load_state_dict(queue.state_dict())
    assert not restored.is_full
    restored.push(rows(4))
    assert restored.is_full
    assert restored.embeddings.flatten().tolist() == [1, 2, 3, 4]
