"""Each row of the methods table against NumPy, and the registry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robust_unlearning import UserError
from robust_unlearning.methods.table import METHODS, Steering, draw_direction, find_method

WIDTH = 8
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
OTHER_MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])


def _reference(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, 4, WIDTH)).astype(np.float32) * 3


def _row_norms(reference: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean L2 norm of each row's tokens, by loops."""
    return np.array(
        [
            np.mean([np.sqrt(np.sum(reference[b, t].astype(np.float64) ** 2)) for t in range(4) if mask[b, t]])
            for b in range(3)
        ]
    )


def _target(name: str, steering: Steering, reference: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
    """A method's target, in the shape of the hidden states."""
    given = None if reference is None else torch.from_numpy(reference)
    target = METHODS[name].target(steering, given, torch.from_numpy(mask))
    return target.expand(3, 4, WIDTH).numpy()


def _steering(scale: float, keep_first: bool = False) -> tuple[Steering, np.ndarray]:
    direction = draw_direction("uniform", WIDTH, 5)
    return Steering(direction, scale, keep_first=keep_first), direction.numpy()


def test_the_table_has_a_test_for_each_row() -> None:
    assert set(METHODS) == {"rmu", "adaptive_rmu", "rsv", "npo", "simnpo", "dpo"}


def test_rmu_pushes_every_token_to_the_scaled_direction() -> None:
    steering, direction = _steering(6.5)
    target = _target("rmu", steering, None, MASK)
    np.testing.assert_allclose(target, np.broadcast_to(6.5 * direction, (3, 4, WIDTH)), rtol=1e-6)
    assert not METHODS["rmu"].needs_reference


def test_adaptive_rmu_gives_each_sequence_its_own_reference_norm() -> None:
    steering, direction = _steering(5.0)
    target = _target("adaptive_rmu", steering, _reference(), MASK)
    expected = 5.0 * _row_norms(_reference(), MASK)[:, None, None] * direction
    np.testing.assert_allclose(target, np.broadcast_to(expected, (3, 4, WIDTH)), rtol=1e-5)
    assert steering.frozen_norm is None


def test_adaptive_rmu_ignores_the_reference_at_padding() -> None:
    reference = _reference()
    changed = np.where(MASK[..., None] == 1, reference, 1e4).astype(np.float32)
    first, second = (_target("adaptive_rmu", _steering(5.0)[0], each, MASK) for each in (reference, changed))
    np.testing.assert_array_equal(first, second)


def test_adaptive_rmu_with_first_batch_keeps_the_mean_norm_of_the_first_batch() -> None:
    steering, direction = _steering(5.0, keep_first=True)
    expected = 5.0 * _row_norms(_reference(0), MASK).mean() * direction
    steering.settle(torch.from_numpy(_reference(0)), torch.from_numpy(MASK))
    for reference, mask in ((_reference(0), MASK), (_reference(1) * 10, OTHER_MASK)):
        target = _target("adaptive_rmu", steering, reference, mask)
        np.testing.assert_allclose(target, np.broadcast_to(expected, (3, 4, WIDTH)), rtol=1e-5)
    assert steering.frozen_norm is not None


def test_adaptive_rmu_per_sample_follows_every_batch() -> None:
    steering, _ = _steering(5.0)
    first = _target("adaptive_rmu", steering, _reference(), MASK)
    second = _target("adaptive_rmu", steering, _reference() * 10, MASK)
    np.testing.assert_allclose(second, first * 10, rtol=1e-5)


@pytest.mark.parametrize("keep_first", [False, True])
def test_adaptive_rmu_on_equal_norms_is_rmu_of_that_scale(keep_first: bool) -> None:
    reference = _reference()
    reference *= 4.0 / np.linalg.norm(reference, axis=-1, keepdims=True)
    steering, _ = _steering(1.5, keep_first)
    steering.settle(torch.from_numpy(reference), torch.from_numpy(MASK))
    assert (steering.frozen_norm is not None) == keep_first
    adaptive = _target("adaptive_rmu", steering, reference, MASK)
    plain = _target("rmu", _steering(1.5 * 4.0)[0], None, MASK)
    np.testing.assert_allclose(adaptive, plain, rtol=1e-5)


def test_rsv_moves_each_token_of_the_reference_along_the_direction() -> None:
    steering, direction = _steering(2.0)
    target = _target("rsv", steering, _reference(), MASK)
    np.testing.assert_allclose(target, _reference() + 2.0 * direction, rtol=1e-5, atol=1e-6)
    distances = np.linalg.norm(target - _reference(), axis=-1)
    np.testing.assert_allclose(distances, 2.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["rmu", "adaptive_rmu", "rsv"])
def test_targets_are_float32_whatever_the_models_type(name: str) -> None:
    reference = torch.from_numpy(_reference()).to(torch.bfloat16)
    assert METHODS[name].target(_steering(2.0)[0], reference, torch.from_numpy(MASK)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_a_direction_is_a_unit_vector_that_the_seed_decides(kind: str) -> None:
    vector = draw_direction(kind, 512, 3)  # type: ignore[arg-type]
    assert vector.shape == (512,)
    assert vector.dtype == torch.float32
    assert vector.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(vector, draw_direction(kind, 512, 3))  # type: ignore[arg-type]
    assert not torch.allclose(vector, draw_direction(kind, 512, 4))  # type: ignore[arg-type]


def test_drawing_a_direction_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    draw_direction("gaussian", 16, 0)
    assert torch.equal(torch.randn(3), expected)


def test_a_uniform_direction_points_into_the_positive_orthant_and_a_gaussian_one_does_not() -> None:
    width = 4096
    uniform = draw_direction("uniform", width, 0) * width**0.5
    gaussian = draw_direction("gaussian", width, 0) * width**0.5
    assert (uniform >= 0).all()
    assert uniform.mean().item() == pytest.approx((3 / 4) ** 0.5, abs=0.03)  # 1/2 over the root of 1/3
    assert gaussian.mean().item() == pytest.approx(0.0, abs=0.08)
    assert (gaussian.abs() < 1).float().mean().item() == pytest.approx(0.683, abs=0.03)


@pytest.mark.parametrize(
    ("name", "direction", "scale"),
    [
        ("rmu", "uniform", "steering_scale"),
        ("adaptive_rmu", "uniform", "adaptive_scale"),
        ("rsv", "gaussian", "steering_scale"),
    ],
)
def test_rows_say_how_the_direction_is_drawn_and_scaled(name: str, direction: str, scale: str) -> None:
    method = find_method(name)
    assert (method.name, method.direction, method.scale_field) == (name, direction, scale)
    assert method.needs_reference == (name != "rmu")
    assert method.title
    assert method.summary
    assert method.paper
    assert method.bibtex.startswith("@")


def test_an_unknown_method_names_the_nearest_all_and_the_next_step() -> None:
    with pytest.raises(UserError) as caught:
        find_method("adaptve_rmu")
    message = str(caught.value)
    assert "unknown method 'adaptve_rmu': did you mean 'adaptive_rmu'?" in message
    assert "adaptive_rmu, dpo, npo, rmu, rsv, simnpo" in message
    assert "unlearn list methods" in message
