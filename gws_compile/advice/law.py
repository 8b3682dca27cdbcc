"""The scaling law of floating-point quantization training, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..numerics.formats import FloatFormat
from .fit import LawFit, fit_law
from .quantities import Block, check_block, positive
from .runs import Run
from .scope import PAPER, Scope
from .terms import NAMES, Array, Points, terms

COMPUTE_PER_BIT = 6 / 16
"""k of C = k N P D: with P = 16 bits the compute C is the usual 6 N D operations."""

_WIDEST = 32  # bits of a format that is looked at


@dataclass(frozen=True)
class LossTerms:
    """The loss, in nats a token, term by term.

    Attributes:
        model: n / N^alpha.
        data: d / D^beta.
        floor: eps.
        precision: the format's term; 0 without quantization.
    """

    model: float
    data: float
    floor: float
    precision: float

    @property
    def loss(self) -> float:
        """The sum."""
        return self.model + self.data + self.floor + self.precision


@dataclass(frozen=True)
class Split:
    """How a number of bits is best split.

    Attributes:
        bits: P = E + M + 1.
        exponent_bits: the real E*, (delta P / (delta + nu)) - 1/2.
        mantissa_bits: the real M*, (nu P / (delta + nu)) - 1/2.
        fmt: the best format of whole numbers; None where P is not whole.
    """

    bits: float
    exponent_bits: float
    mantissa_bits: float
    fmt: FloatFormat | None


@dataclass(frozen=True)
class Budget:
    """What a compute budget C = k N P D buys at best.

    Attributes:
        compute: C, operations of a 16-bit unit (6 N D at 16 bits).
        bits: P.
        params: N.
        tokens: D.
        loss: nats a token, with P split at its real best where no format is given.
    """

    compute: float
    bits: float
    params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """The law, by default with the published coefficients.

    ``L = n/N^alpha + d/D^beta + eps + D^beta/N^alpha * log2(B) / (gamma (E+1/2)^delta (M+1/2)^nu)``, arXiv 2501.02423.
    Parameters N are the weights of the layers' matrices, without embeddings.

    Attributes:
        n: of the model's term.
        alpha: exponent of N.
        d: of the data's term.
        beta: exponent of D.
        eps: the loss that is left, in nats a token.
        gamma: of the format's term.
        delta: exponent of the exponent bits.
        nu: exponent of the mantissa bits.
        log2_channel: what stands for log2(B) with a scale a channel.
        scope: what it was fitted to.
        fitted: the fit, of a law that `fit` has made.

    Raises:
        ValueError: a coefficient that is not above 0.
    """

    n: float = 69.2343
    alpha: float = 0.2368
    d: float = 68973.0621
    beta: float = 0.5162
    eps: float = 1.9061
    gamma: float = 11334.5197
    delta: float = 3.1926
    nu: float = 2.9543
    log2_channel: float = 13.1567
    scope: Scope = field(default=PAPER, repr=False)
    fitted: LawFit | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in (*NAMES, "log2_channel"):
            positive(name, getattr(self, name))

    @classmethod
    def fit(cls, runs: Iterable[Run | dict[str, Any]] | dict[str, Any], start: ScalingLaw | None = None) -> ScalingLaw:
        """Fit the law to runs of one's own.

        Least squares on the loss's logarithm with Huber's loss, from several starts. Coefficients that the runs cannot
        determine keep the value of ``start``; `LawFit.coefficients` says which, and why.

        Args:
            runs: dicts with ``params``, ``tokens``, ``loss``, ``fmt`` (None for no quantization) and ``block``
                (128 where it is missing), or such a list under the key ``runs``; see `gws_compile.advice.runs`.
            start: another law whose coefficients are the first guess; the published one by default.

        Returns:
            The law, with `fitted` and its own `scope`.

        Raises:
            ValueError: fewer than 3 runs, or a run that lacks something.
            ImportError: scipy is missing.
        """
        start = start or cls()
        fitted, scope = fit_law(runs, start.coefficients, start.log2_channel)
        values = {coefficient.name: coefficient.value for coefficient in fitted.coefficients}
        return cls(**values, log2_channel=start.log2_channel, scope=scope, fitted=fitted)

    @property
    def coefficients(self) -> Array:
        """The eight coefficients, in the order of the fields."""
        return np.array([getattr(self, name) for name in NAMES], dtype=np.float64)

    def log2_block(self, block: Block) -> float:
        """log2(B).

        Raises:
            ValueError: see `gws_compile.advice.quantities.check_block`.
        """
        checked = check_block(block)
        return self.log2_channel if checked == "channel" else math.log2(checked)

    def terms(
        self,
        params: float,
        tokens: float,
        exponent_bits: float | None = None,
        mantissa_bits: float | None = None,
        block: Block = 128,
    ) -> LossTerms:
        """The loss, term by term.

        Args:
            params: N.
            tokens: D.
            exponent_bits: E, real or whole; None for no quantization.
            mantissa_bits: M; None for no quantization.
            block: elements to a scale.

        Raises:
            ValueError: a value that is none, or one of E and M alone.
        """
        plain = exponent_bits is None
        if plain != (mantissa_bits is None):
            raise ValueError(
                f"exponent_bits is {exponent_bits!r} and mantissa_bits {mantissa_bits!r}: give both, or none"
            )
        for name, given in (("exponent_bits", exponent_bits), ("mantissa_bits", mantissa_bits)):
            if given is not None and not 0 <= given < math.inf:
                raise ValueError(f"{name} is {given!r}; accepted: a number of bits, 0 or more")
        values = (
            positive("params", params),
            positive("tokens", tokens),
            exponent_bits or 0,
            mantissa_bits or 0,
            0 if plain else self.log2_block(block),
        )
        at = Points(*(np.array(value, dtype=np.float64) for value in values))
        return LossTerms(*map(float, terms(self.coefficients, at)))

    def loss(
        self,
        params: float,
        tokens: float,
        exponent_bits: float | None = None,
        mantissa_bits: float | None = None,
        block: Block = 128,
    ) -> float:
        """The loss, in nats a token; arguments and errors as in `terms`."""
        return self.terms(params, tokens, exponent_bits, mantissa_bits, block).loss

    def strength(self, exponent_bits: float, mantissa_bits: float) -> float:
        """By how much a format divides its term: gamma (E + 1/2)^delta (M + 1/2)^nu."""
        return float(self.gamma * (exponent_bits + 0.5) ** self.delta * (mantissa_bits + 0.5) ** self.nu)

    def critical_tokens(self, params: float, exponent_bits: float, mantissa_bits: float, block: Block = 128) -> float:
        """The number of tokens D_crit from which on more data raises the loss.

        Where dL/dD = 0: ``[d gamma N^alpha (E+1/2)^delta (M+1/2)^nu / log2 B]^(1 / (2 beta))``.

        Raises:
            ValueError: a bad number of parameters or block.
        """
        grown = self.d * positive("params", params) ** self.alpha * self.strength(exponent_bits, mantissa_bits)
        return float((grown / self.log2_block(block)) ** (1 / (2 * self.beta)))

    def best_split(self, bits: float) -> Split:
        """How P bits, the sign's among them, are best split.

        The real split maximizes (E + 1/2)^delta (M + 1/2)^nu; the whole one is the best of all by that figure.

        Raises:
            ValueError: fewer than 3 bits or more than 32.
        """
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not 3 <= bits <= _WIDEST:
            raise ValueError(f"bits is {bits!r}; accepted: 3 to {_WIDEST}, a sign, exponent and mantissa bits")
        whole = splits(int(bits)) if bits == int(bits) else []
        best = max(whole, key=lambda fmt: self.strength(fmt.exponent_bits, fmt.mantissa_bits), default=None)
        return Split(float(bits), *self._real_split(bits), best)

    def best_bits(self, tokens: float, block: Block = 128) -> float:
        """The best number of bits P(D) for D tokens at any compute budget.

        With C = k N P D fixed and D given, N = C / (k P D), and with the best real split the format's term falls as
        P^-(delta + nu): L grows as P^alpha (n + q' P^-s), whose minimum lies at P^s = D^beta q, whatever C is.

        Raises:
            ValueError: a bad number of tokens or block, or a law with alpha >= delta + nu, which has no best.
        """
        return float((positive("tokens", tokens) ** self.beta * self._q(block)) ** (1 / (self.delta + self.nu)))

    def best_format(self, tokens: float, block: Block = 128) -> FloatFormat:
        """The format of whole numbers of bits with the least loss for D tokens at any compute budget.

        Raises:
            ValueError: a bad number of tokens or block.
        """
        factor = positive("tokens", tokens) ** self.beta * self.log2_block(block)

        def grown(fmt: FloatFormat) -> float:
            term = factor / self.strength(fmt.exponent_bits, fmt.mantissa_bits)
            return float(fmt.storage_bits**self.alpha * (self.n + term))

        return min((fmt for bits in range(3, _WIDEST + 1) for fmt in splits(bits)), key=grown)

    def best_budget(self, compute: float, block: Block = 128) -> Budget:
        """The best bits, parameters and tokens for a compute budget C = k N P D, k = 6/16.

        With P = (D^beta q)^(1/s), s = delta + nu, and N = C / (k P D), dL/dD = 0 is

        ``(n alpha (s + beta) / (s - alpha)) (k q^(1/s) D^(1 + beta/s) / C)^alpha = beta d D^-beta``,

        one power of D.

        Raises:
            ValueError: a bad budget or block, or a law with alpha >= delta + nu, which has no best.
        """
        both, q = self.delta + self.nu, self._q(block)
        budget = positive("compute", compute) / (COMPUTE_PER_BIT * q ** (1 / both))
        left = self.beta * self.d * (both - self.alpha) / (self.alpha * self.n * (both + self.beta))
        tokens = (left * budget**self.alpha) ** (1 / (self.alpha * (1 + self.beta / both) + self.beta))
        bits = (q * tokens**self.beta) ** (1 / both)
        params = compute / (COMPUTE_PER_BIT * bits * tokens)
        loss = self.loss(params, tokens, *self._real_split(bits), block=block)
        return Budget(float(compute), bits, params, tokens, loss)

    def format_budget(self, compute: float, fmt: FloatFormat, block: Block = 128) -> Budget:
        """The best parameters and tokens for a compute budget with a format.

        Raises:
            ValueError: a bad budget or block.
        """
        return self._budget(compute, fmt.storage_bits, fmt.exponent_bits, fmt.mantissa_bits, block)

    def real_budget(self, compute: float, bits: float, block: Block = 128) -> Budget:
        """The best parameters and tokens for a compute budget with P bits, split at their real best.

        Raises:
            ValueError: a bad budget, number of bits or block.
        """
        split = self.best_split(bits)
        return self._budget(compute, bits, split.exponent_bits, split.mantissa_bits, block)

    def _budget(self, compute: float, bits: float, exponent_bits: float, mantissa_bits: float, block: Block) -> Budget:
        """The best N and D at a precision: dL/dln D grows with D, so bisection on ln D finds its one zero."""
        product = positive("compute", compute) / (COMPUTE_PER_BIT * bits)  # N D
        term = self.log2_block(block) / self.strength(exponent_bits, mantissa_bits)

        def slope(log_tokens: float) -> float:
            shrunk = math.exp(self.alpha * (log_tokens - math.log(product)))  # N^-alpha
            grown = math.exp(self.beta * log_tokens)
            model = self.alpha * self.n + (self.alpha + self.beta) * term * grown
            return shrunk * model - self.beta * self.d / grown

        low, high = -100.0, math.log(product) + 100.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        tokens = math.exp((low + high) / 2)
        loss = self.loss(product / tokens, tokens, exponent_bits, mantissa_bits, block)
        return Budget(float(compute), float(bits), product / tokens, tokens, loss)

    def _real_split(self, bits: float) -> tuple[float, float]:
        """E* and M* of P bits."""
        both = self.delta + self.nu
        return self.delta * bits / both - 0.5, self.nu * bits / both - 0.5

    def _q(self, block: Block) -> float:
        """Q of P^s = D^beta q, the best bits for D tokens."""
        both = self.delta + self.nu
        if self.alpha >= both:
            raise ValueError(f"a law with alpha={self.alpha:.4g} above delta + nu = {both:.4g} has no best precision")
        split = (self.delta / both) ** self.delta * (self.nu / both) ** self.nu
        return float(self.log2_block(block) * (both - self.alpha) / (self.alpha * self.n * self.gamma * split))


def splits(bits: int) -> list[FloatFormat]:
    """Every format of so many bits, from the most mantissa bits to the fewest."""
    made = (_made(e, bits - 1 - e) for e in range(1, min(8, bits - 2) + 1) if bits - 1 - e <= 23)
    return [fmt for fmt in made if fmt is not None]


def _made(exponent_bits: int, mantissa_bits: int) -> FloatFormat | None:
    """A format; None where its values do not lie in the range that is held."""
    try:
        return FloatFormat.make(exponent_bits, mantissa_bits)
    except ValueError:
        return None
