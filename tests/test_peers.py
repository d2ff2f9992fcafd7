"""Against PyTorch, where it is installed: outputs, gradients and running statistics, in both of its layouts."""

import numpy as np
import pytest

import fastbn
from combinations import each_activation, each_mode, make_problem, with_or_without_residual
from tolerances import torch_rtol

torch = pytest.importorskip("torch")

SHAPES = [(6, 5), (4, 7, 13), (5, 6, 9, 7), (3, 4, 5, 6, 7)]


def close(actual, expected, dtype, scale=1.0):
    """Within the tolerance of the largest value, or of `scale` if that is larger."""
    expected = expected.detach().numpy()
    largest = max(np.abs(expected).max(), scale)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=torch_rtol(dtype) * largest)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_mode
@each_activation
@with_or_without_residual
@pytest.mark.parametrize("order", ["c-order", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank{len(shape)}")
def test_same_as_pytorch(dtype, training, activation, with_residual, order, shape):
    p = make_problem(shape, dtype, order=order, with_residual=with_residual)
    gamma, beta = p.gamma.astype(dtype), p.beta.astype(dtype)
    rng = np.random.default_rng(9)
    mean, var = rng.standard_normal(shape[1]).astype(dtype), rng.uniform(0.5, 2, shape[1]).astype(dtype)
    theirs = {
        key: None if value is None else torch.tensor(value, requires_grad=key not in ("mean", "var"))
        for key, value in {"x": p.x, "r": p.residual, "gamma": gamma, "beta": beta, "mean": mean, "var": var}.items()
    }
    v = torch.nn.functional.batch_norm(
        theirs["x"], theirs["mean"], theirs["var"], theirs["gamma"], theirs["beta"], training, 0.3, 1e-4
    )
    v = v if theirs["r"] is None else v + theirs["r"]
    expected = v if activation == "identity" else getattr(torch.nn.functional, activation)(v)
    expected.backward(torch.tensor(p.dy))
    y, cache = fastbn.batchnorm_forward(
        p.x,
        gamma,
        beta,
        running_mean=mean,
        running_var=var,
        training=training,
        momentum=0.3,
        eps=1e-4,
        activation=activation,
        residual=p.residual,
    )
    gradients = fastbn.batchnorm_backward(p.dy, cache)
    close(y, expected, dtype)
    close(mean, theirs["mean"], dtype)
    close(var, theirs["var"], dtype)
    # PyTorch takes a sixth in float32 for the gradient of hardsigmoid, also in float64.
    dtype = "float32" if activation == "hardsigmoid" else dtype
    close(gradients.dx, theirs["x"].grad, dtype)
    terms = np.abs(p.dy).sum() / shape[1]  # the rounding of a sum goes with its terms
    close(gradients.dgamma, theirs["gamma"].grad, dtype, terms)
    close(gradients.dbeta, theirs["beta"].grad, dtype, terms)
    if with_residual:
        close(gradients.dresidual, theirs["r"].grad, dtype)
