"""LSQ against its specification (baselines.md sections 3, 4, 6, 10, 11 and the comparison of section 8.2)."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch
from references import lsq, lsq_step

from fat_plugins import TensorSpec, get_algorithm, param_groups

LSQ = get_algorithm("lsq")


def weight(shape, bits=3, **spec):
    return LSQ.make(TensorSpec("weight", bits, name="w", shape=tuple(shape), **spec)).double()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_initial_step(bits):
    w = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    high = 2 ** (bits - 1) - 1
    quantizer = weight(w.shape, bits)
    quantizer.calibrate(w)
    assert quantizer.step.item() == pytest.approx(lsq_step(w.numpy(), high), rel=1e-12)
    per_channel = weight(w.shape, bits, per_channel=True)
    per_channel.calibrate(w)
    expected = [lsq_step(row, high) for row in w.numpy()]
    assert np.allclose(per_channel.step.detach().numpy(), expected, rtol=1e-12)
    x = torch.rand(4, 3, 5)
    act = LSQ.make(TensorSpec("activation", bits))
    act.calibrate(x)
    first = act.step.item()
    assert first == pytest.approx(lsq_step(x.numpy(), 2**bits - 1), rel=1e-5)
    act.calibrate(x * 10)  # the first batch decides
    assert act.step.item() == first
    act.calibrate(x - 0.5)  # but a grid that turns signed has another Q_P
    assert act.step.item() == pytest.approx(first * sqrt((2**bits - 1) / high), rel=1e-5)


def test_gradients_at_three_bits_with_both_clip_sides():
    """Section 11, item 3: Q_N = 4, Q_P = 3; values below, on, inside, and above the clip band."""
    v = torch.tensor([[-5.0, -4.0, -3.6, -0.4, 0.0, 0.6, 2.4, 2.6, 3.0, 3.3, 9.0]], dtype=torch.float64)
    quantizer = weight(v.shape)
    quantizer.calibrate(v)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    grad = torch.arange(1.0, 12.0, dtype=torch.float64).reshape(1, -1)
    v.requires_grad_()
    quantizer(v).backward(grad)
    assert v.grad.tolist() == [[0, 0, 3, 4, 5, 6, 7, 8, 0, 0, 0]]
    residual = [-4, -4, -0.4, 0.4, 0, 0.4, -0.4, 0.4, 3, 3, 3]  # round(v/s) - v/s inside, -Q_N and Q_P outside
    g = 1 / sqrt(11 * 3)
    assert float(quantizer.step.grad) == pytest.approx(g * sum(r * w for r, w in zip(residual, grad[0], strict=True)))


def test_clip_comes_before_rounding():
    """Section 10: Brevitas clips after rounding; they differ for v/s in (Q_P, Q_P + 1/2)."""
    v = torch.tensor([[3.3]], dtype=torch.float64, requires_grad=True)
    quantizer = weight(v.shape)
    quantizer(v).backward(torch.ones_like(v))
    assert v.grad.item() == 0  # outside for us; inside when rounding comes first
    assert float(quantizer.step.grad) == pytest.approx(3 / sqrt(3))


@pytest.mark.parametrize("shape,per_channel", [((8, 4, 3, 3), None), ((8, 4, 3, 3), True), ((6, 10), None)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradient_scale_counts_the_weights_of_one_step(shape, per_channel, bits):
    w = torch.randn(shape, dtype=torch.float64)
    quantizer = weight(shape, bits, per_channel=per_channel)
    quantizer.calibrate(w)
    grad = torch.randn(shape, dtype=torch.float64)
    quantizer(w).backward(grad)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = quantizer.step.detach().numpy()
    count = w.numel() / step.size
    view = step.reshape(-1, *[1] * (len(shape) - 1)) if per_channel else step.reshape([1] * len(shape))
    expected = lsq(w.numpy(), view, low, high, 1 / sqrt(count * high), grad.numpy())
    assert np.allclose(quantizer.step.grad.numpy(), expected["ds"].reshape(-1), rtol=1e-10)


def test_activation_gradient_scale_counts_features_of_a_sample():
    x = torch.rand(16, 3, 4, 4, dtype=torch.float64)
    quantizer = LSQ.make(TensorSpec("activation", 2)).double()
    quantizer.calibrate(x)
    grads = []
    for batch in (x, torch.cat([x, x])):  # twice the samples: twice the gradient, the same g
        quantizer.step.grad = None
        quantizer(batch).sum().backward()
        grads.append(float(quantizer.step.grad))
    assert grads[1] == pytest.approx(2 * grads[0])
    expected = lsq(x.numpy(), float(quantizer.step.detach()), 0, 3, 1 / sqrt(48 * 3), np.ones(x.shape))
    assert grads[0] == pytest.approx(float(expected["ds"]))


def test_in_range_gradient_of_nncf_is_three_sevenths_at_three_bits():
    """Section 8.2 and section 11, item 6. NNCF's symmetric rule, written out: scale = Q_P s, input_range =
    scale (1 + Q_N / Q_P), gradient (FQ - x) / input_range per unit of the scale. LSQ: (q - x/s) / Q_P per unit."""
    w = torch.tensor([[0.3, 1.4, -2.2, 0.9]], dtype=torch.float64)
    quantizer = weight(w.shape)
    q_n, q_p = 4, 3
    fq = quantizer(w)  # step 1
    nncf = ((fq - w) / (q_p * (1 + q_n / q_p))).sum()
    fq.sum().backward()
    ours = float(quantizer.step.grad) * sqrt(w.numel() * q_p) / q_p  # without g; d step / d scale = 1 / Q_P
    assert float(nncf.detach()) / ours == pytest.approx(3 / 7)


def test_steps_cannot_reach_zero():
    for bad in (0.0, -1.0, -1e20):
        quantizer = weight((4, 4))
        with torch.no_grad():
            quantizer.step.fill_(bad)
        assert quantizer(torch.randn(4, 4, dtype=torch.float64)).isfinite().all()


def test_steps_follow_the_base_learning_rate():
    quantizer = weight((4, 4))
    (group,) = param_groups(quantizer, lr=0.01, weight_decay=1e-4)
    assert group == {"params": [quantizer.step], "lr": 0.01, "weight_decay": 1e-4}
