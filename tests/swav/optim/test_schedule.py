import numpy as np
import pytest

from swav.optim.schedule import cosine_factor, steps_factor, warmup_cosine

PAPER = {"start_lr": 0.0, "base_lr": 4.8, "final_lr": 0.0048}


def test_every_step_equals_the_formula() -> None:
    num_steps, warmup_steps = 3130, 313
    expected = np.concatenate(
        [
            np.linspace(0.0, 4.8, warmup_steps),
            [
                0.0048 + 0.5 * (4.8 - 0.0048) * (1 + np.cos(np.pi * t / (num_steps - warmup_steps)))
                for t in range(num_steps - warmup_steps)
            ],
        ]
    )
    found = [warmup_cosine(step, num_steps=num_steps, warmup_steps=warmup_steps, **PAPER) for step in range(num_steps)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_warm_up_ends_at_the_base_and_the_cosine_starts_there() -> None:
    assert warmup_cosine(9, num_steps=100, warmup_steps=10, **PAPER) == 4.8
    assert warmup_cosine(10, num_steps=100, warmup_steps=10, **PAPER) == 4.8


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_hardly_any_warm_up_starts_at_the_base(warmup_steps: int) -> None:
    assert warmup_cosine(0, num_steps=100, warmup_steps=warmup_steps, **PAPER) == 4.8


def test_a_run_of_warm_up_only_is_possible() -> None:
    assert warmup_cosine(9, num_steps=10, warmup_steps=10, **PAPER) == 4.8


def test_the_cosine_tends_to_the_final_rate() -> None:
    assert warmup_cosine(100, num_steps=100, warmup_steps=10, **PAPER) == pytest.approx(0.0048, abs=1e-12)


def test_a_cosine_falls_from_one_to_zero() -> None:
    expected = 0.5 * (1 + np.cos(np.pi * np.arange(500) / 500))
    np.testing.assert_allclose([cosine_factor(step, num_steps=500) for step in range(500)], expected, atol=1e-15)
    assert cosine_factor(0, num_steps=500) == 1.0
    assert cosine_factor(500, num_steps=500) == 0.0


def test_a_rate_drops_at_the_named_steps_and_stays() -> None:
    found = [steps_factor(step, drops=[3, 5, 6], factor=0.1) for step in range(9)]
    np.testing.assert_allclose(found, [1, 1, 1, 0.1, 0.1, 0.01, 0.001, 0.001, 0.001], rtol=1e-15)
