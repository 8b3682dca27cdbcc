"""The equation of the scaling law and its derivatives, on arrays.

    L = n / N^alpha + d / D^beta + eps + D^beta / N^alpha * log2(B) / (gamma (E + 1/2)^delta (M + 1/2)^nu)

for N parameters, D tokens, E exponent and M mantissa bits, and B elements to a scale. Source: Sun et al., "Scaling Laws
for Floating-Point Quantization Training", arXiv 2501.02423.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NAMES = ("n", "alpha", "d", "beta", "eps", "gamma", "delta", "nu")
"""The coefficients, in the order in which arrays of them are."""

Array = npt.NDArray[np.float64]


class Points(NamedTuple):
    """What the law is evaluated at; arrays of one shape, or numbers.

    Attributes:
        params: N, weights of the layers' matrices.
        tokens: D.
        exponent_bits: E.
        mantissa_bits: M.
        log2_block: log2(B); 0 where nothing is quantized, which makes the last term 0.
    """

    params: Array
    tokens: Array
    exponent_bits: Array
    mantissa_bits: Array
    log2_block: Array


class Terms(NamedTuple):
    """The four terms of the loss, in nats a token.

    Attributes:
        model: what the model's size leaves, ``n / N^alpha``.
        data: what the data's size leaves, ``d / D^beta``.
        floor: ``eps``.
        precision: what the format costs.
    """

    model: Array
    data: Array
    floor: Array
    precision: Array

    @property
    def loss(self) -> Array:
        """Their sum."""
        return self.model + self.data + self.floor + self.precision


def terms(coefficients: Array, at: Points) -> Terms:
    """The terms of the loss.

    Args:
        coefficients: (8,), in the order of `NAMES`.
        at: arrays of one shape.

    Returns:
        Arrays of that shape.
    """
    n, alpha, d, beta, eps, gamma, delta, nu = coefficients
    strength = gamma * (at.exponent_bits + 0.5) ** delta * (at.mantissa_bits + 0.5) ** nu
    shape = np.shape(at.params)
    return Terms(
        n * at.params**-alpha,
        d * at.tokens**-beta,
        np.full(shape, eps),
        at.tokens**beta * at.params**-alpha * at.log2_block / strength,
    )


def log_gradient(coefficients: Array, at: Points) -> Array:
    """The derivatives of the loss's logarithm by the coefficients' logarithms.

    Args:
        coefficients: (8,), in the order of `NAMES`.
        at: arrays of shape (points,).

    Returns:
        (points, 8).
    """
    _, alpha, _, beta, _, _, delta, nu = coefficients
    model, data, floor, precision = found = terms(coefficients, at)
    columns = (
        model,
        -alpha * np.log(at.params) * (model + precision),
        data,
        beta * np.log(at.tokens) * (precision - data),
        floor,
        -precision,
        -delta * np.log(at.exponent_bits + 0.5) * precision,
        -nu * np.log(at.mantissa_bits + 0.5) * precision,
    )
    return np.stack(columns, axis=-1) / found.loss[..., None]
