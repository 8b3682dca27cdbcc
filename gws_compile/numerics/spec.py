"""What is done to a weight, or to another operand of a product, composed once: `SampleSpec`; and `WidthGradientSpec`
for the gradient of learned widths.

Each has a part for blocks and a part for elements, over `Primitives`. The eager kernels, Inductor's loops and the C++
kernel bring the loops around them; the metrics read their grids.

What a value is computed from comes as a function (`Operand`, `Words`): it is called where the value is needed, so that
a compiler writes down nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch

from .cast import cast, largest_value, needs_rounding, round_to_dtype
from .division import divide
from .elements import ElementFormat
from .float32 import bits_float32, nearest_float32
from .grid_cast import Grid, block_grid, cast_to_grid
from .keys import key_words
from .noise import add_noise, fixed_amplitude, random_word, signed_draw
from .nvfp4 import encode_scale, nvfp4_scale
from .primitives import Primitives, Value
from .scales import POWERS_OF_TWO, block_scale, needs_block_maximum
from .widths import WidthRule, amplitude, width, width_gradient

Operand = Callable[[], Value]
"""Loads one value."""

Words = Callable[[int], Value]
"""Loads a word of a key (two int32) or of the clock, see `gws_compile.ops.sample_weight`, by position."""

CLOCK_WORDS = 5
"""int32 words of a clock."""

Rounding = Literal["nearest", "stochastic"]
"""How the cast rounds."""

_GRID = ("x", "largest", "smallest", "shift")
_SCHEDULED = 3
"""The word of the clock that has the bits of ``2**(1 - b)``, for a width that a schedule moves."""
_UNROUNDED = 4
"""The word of the clock that says which kinds of products are in high precision now; see `SampleSpec.switch`."""


@dataclass(frozen=True)
class SampleSpec:
    """``cast(w + R * a * 2**(1 - b))``, or ``cast(w)`` without noise: everything about it but tensors and blocks.

    Of an activation or a gradient, ``cast(x)``: there is no noise, but the cast may round stochastically.

    Attributes:
        fmt: element format of the cast; with learned widths, that of training.
        noise: law of R, see `gws_compile.numerics.noise.draw`; ``"none"`` for the cast alone.
        bits: bit width b of the noise, where it is fixed; None where the clock says it, or where it is learned.
        scale: rule of the block scale, one of `gws_compile.numerics.scales.SCALES`.
        rule: what the parameter of a learned width means; None for a fixed width.
        dtype: the weight's.
        rounding: of the cast.
        place: of a stochastic cast: a number that makes its random words others than those of the same key elsewhere.
        switch: bits of the clock's fifth word: while one of them is set, the value stays as it is. 0 for never.
    """

    fmt: ElementFormat
    noise: str
    bits: float | None
    scale: str | None
    rule: WidthRule | None
    dtype: torch.dtype
    rounding: Rounding = "nearest"
    place: int = 0
    switch: int = 0

    @property
    def noisy(self) -> bool:
        """Whether there is noise."""
        return self.noise != "none"

    @property
    def keyed(self) -> bool:
        """Whether random words are drawn, which needs a key and a clock."""
        return self.noisy or self.rounding == "stochastic"

    @property
    def clocked(self) -> bool:
        """Whether a clock is needed."""
        return self.keyed or self.switch != 0

    @property
    def block_values(self) -> Mapping[str, torch.dtype]:
        """What `of_block` gives, by name, each with its dtype. Empty where no block maximum is needed."""
        values: dict[str, torch.dtype] = {}
        if self.noisy:
            values["amplitude"] = torch.float32
        if self.rule is not None:
            return values | dict.fromkeys(self._grid, torch.int32)
        if needs_block_maximum(self.fmt, self.scale, self.noise):
            if self._scaled:
                values["inverse"] = torch.float32
            values["x"] = torch.float32
        return values

    @property
    def needs_matrix_maximum(self) -> bool:
        """Whether the scales have a level for the whole matrix."""
        return self.scale == "nvfp4"

    @property
    def matrix_values(self) -> tuple[str, ...]:
        """What `of_matrix` gives, by name, all of it float32; empty where the scales have no level for the matrix."""
        return ("encode", "decode") if self.needs_matrix_maximum and self.block_values else ()

    def of_matrix(self, p: Primitives, maximum: Operand) -> dict[str, Operand]:
        """What the blocks of a matrix have in common.

        Args:
            p: the operations to write it in.
            maximum: float32, the maximum over what is finite of the matrix.

        Returns:
            The `matrix_values`, as functions that compute them.
        """
        if not self.matrix_values:
            return {}
        encode = cache(lambda: encode_scale(p, maximum()))
        return {"encode": encode, "decode": lambda: divide(p, 1.0, encode())}

    @property
    def is_cheap(self) -> bool:
        """Whether the `block_values` take few instructions, so that it costs little to compute them again."""
        return self.rule is None and (not self._scaled or self.scale in POWERS_OF_TWO)

    @property
    def _scaled(self) -> bool:
        return self.fmt.scaled and self.scale is not None

    @property
    def _grid(self) -> tuple[str, ...]:
        """The fields of the grids of learned widths."""
        return (*_GRID, "inverse") if self.scale == "amax" else _GRID

    def of_block(
        self,
        p: Primitives,
        amax: Operand,
        learned: Operand | None = None,
        clock: Words | None = None,
        matrix: Callable[[str], Value] | None = None,
    ) -> dict[str, Operand]:
        """What the elements of a block have in common.

        Args:
            p: the operations to write it in.
            amax: float32, the block maximum.
            learned: float32, the width parameter; None for a fixed width.
            clock: the clock's words; None without noise.
            matrix: loads one of the `matrix_values` of its matrix; None where there are none.

        Returns:
            The `block_values`, as functions that compute them.
        """
        if self.rule is not None:
            assert learned is not None
            return self._of_learned_block(p, self.rule, amax, learned, clock)
        values: dict[str, Operand] = {}
        if self.noisy:
            values["amplitude"] = lambda: self._amplitude(p, amax(), clock)
        if needs_block_maximum(self.fmt, self.scale, self.noise):
            scale = cache(lambda: self._block_scale(p, amax(), matrix))
            values["x"] = lambda: scale()[1]
            if self._scaled:
                values["inverse"] = lambda: scale()[0]
        return values

    def _amplitude(self, p: Primitives, amax: Value, clock: Words | None) -> Value:
        if self.bits is not None:
            return fixed_amplitude(p, amax, self.bits)
        assert clock is not None
        return p.fmul(amax, p.bits_float(clock(_SCHEDULED)))

    def _block_scale(
        self, p: Primitives, amax: Value, matrix: Callable[[str], Value] | None
    ) -> tuple[Value | None, Value]:
        if not self.needs_matrix_maximum:
            return block_scale(p, amax, self.fmt, self.scale, self.dtype)
        assert matrix is not None
        return nvfp4_scale(p, amax, matrix("encode"), matrix("decode"), self.dtype)

    def _of_learned_block(
        self, p: Primitives, rule: WidthRule, amax: Operand, learned: Operand, clock: Words | None
    ) -> dict[str, Operand]:
        b = cache(lambda: width(p, learned(), rule))

        @cache
        def grid() -> Grid:
            widths = b()
            drawing = None
            if self.noisy:
                assert clock is not None
                drawing = p.iand(clock(1), p.ixor(clock(2), -1))
            return block_grid(p, widths, amax(), drawing, self.fmt, rule, self.scale, self.dtype)

        values: dict[str, Operand] = {}
        if self.noisy:
            values["amplitude"] = lambda: amplitude(p, b(), amax())
        for name in self._grid:
            # Some are the same for all widths: Python numbers, of which the sum makes a value.
            values[name] = partial(lambda name: p.iadd(getattr(grid(), name), 0), name)
        return values

    def of_element(
        self,
        p: Primitives,
        w: Value,
        block: Callable[[str], Value],
        element: Operand | None = None,
        key: Words | None = None,
        clock: Words | None = None,
    ) -> Value:
        """Sample an element.

        Args:
            p: the operations to write it in.
            w: float32, the weight.
            block: loads one of the `block_values` of its block.
            element: int32, its index in the whole weight, row-major, mod 2**32; None where nothing is drawn.
            key: the key's words; None where nothing is drawn.
            clock: the clock's words; None where `clocked` says no.

        Returns:
            float32 on the grid of its block; the weight itself while it is switched off.
        """
        y = w
        if self.noisy:
            assert element is not None
            assert key is not None
            assert clock is not None
            scaled_by = block("amplitude")
            y = add_noise(p, self.noise, w, scaled_by, _word(p, element, key, clock), clock(1))
        if self.rule is not None:
            sampled = cast_to_grid(p, y, Grid(*map(block, self._grid)))
        elif self.scale == "unit":
            inverse = self.fmt.max if self.fmt.scaled else None
            sampled = cast(p, y, inverse, None, self.fmt, self.scale, self.dtype, self._chance(p, element, key, clock))
            sampled = sampled if inverse is None else p.fmul(sampled, nearest_float32(1 / inverse))
        else:
            values = self.block_values
            inverse, x = (block(name) if name in values else None for name in ("inverse", "x"))
            sampled = cast(p, y, inverse, x, self.fmt, self.scale, self.dtype, self._chance(p, element, key, clock))
        return self._switched(p, w, self._rounded(p, sampled), clock)

    def _chance(self, p: Primitives, element: Operand | None, key: Words | None, clock: Words | None) -> Value | None:
        """The random word of a stochastic cast; None for the nearest value."""
        if self.rounding == "nearest":
            return None
        assert element is not None
        assert key is not None
        assert clock is not None
        return random_word(p, element(), key_at(p, key, self.place), clock(0))

    def _switched(self, p: Primitives, w: Value, sampled: Value, clock: Words | None) -> Value:
        if not self.switch:
            return sampled
        assert clock is not None
        return p.fselect(p.ilt(p.isub(0, p.iand(clock(_UNROUNDED), self.switch)), 0), w, sampled)

    def levels_of_element(self, p: Primitives, w: Value, block: Callable[[str], Value]) -> tuple[Value, Value]:
        """An element cast without noise, in units of its block's scale X, what a file stores a code of; and the cast.

        Args:
            p: the operations to write it in.
            w: float32, the weight.
            block: loads one of the `block_values` of its block.

        Returns:
            float32 on the grid of the element format, without a block scale; and, as `of_element` without noise, this
            times X, rounded to what the dtype holds. Without meaning in a block with a NaN or an Inf, and for formats
            without a scale.
        """
        if self.rule is not None:
            grid = Grid(*map(block, self._grid))
            inverse = p.isub(254 << 23, grid.x) if grid.inverse is None else grid.inverse
            level = cast_to_grid(p, w, replace(grid, x=p.iadd(p.iand(grid.x, 0), 127 << 23), inverse=inverse))
            x: Value = p.bits_float(grid.x)
        else:
            inverse = block("inverse") if "inverse" in self.block_values else None
            level = cast(p, w, inverse, 1.0, self.fmt, self.scale, self.dtype)
            x = block("x") if "x" in self.block_values else 1.0
        return level, self._rounded(p, p.fmul(level, x))

    def _rounded(self, p: Primitives, sampled: Value) -> Value:
        """A sample rounded to what the dtype holds, where its grid has more."""
        formats = (self.fmt,) if self.rule is None else (self.fmt, *self.rule.formats)
        exact = self.scale in (*POWERS_OF_TWO, None)
        if any(needs_rounding(fmt, exact, self.dtype) for fmt in formats):
            return round_to_dtype(p, sampled, self.dtype)
        return sampled

    def grid_limit(
        self, p: Primitives, amax: Value, learned: Value | None = None, matrix: Callable[[str], Value] | None = None
    ) -> tuple[Value, Value]:
        """The largest magnitude of a block's grid without noise: two float32 factors, the first NaN in a broken block.

        Args:
            p: the operations to write it in.
            amax: float32, the block maximum.
            learned: float32, the width parameter; None for a fixed width.
            matrix: as in `of_block`.
        """
        if self.rule is None:
            _, x = self._block_scale(p, amax, matrix)
            return x, largest_value(self.fmt, self.scale, self.dtype)
        grid = block_grid(p, width(p, learned, self.rule), amax, None, self.fmt, self.rule, self.scale, self.dtype)
        largest = grid.largest
        return p.bits_float(grid.x), bits_float32(largest) if isinstance(largest, int) else p.bits_float(largest)


@dataclass(frozen=True)
class WidthGradientSpec:
    """The gradient of a learned width's parameter, ``dL/db = -ln 2 * 2**(1 - b) * a * sum(dL/dw_hat * R)``, in parts.

    Attributes:
        noise: law of R.
        rule: what the parameter means.
    """

    noise: str
    rule: WidthRule

    def of_element(self, p: Primitives, element: Operand, key: Words, clock: Words) -> Value:
        """float32, R; arguments as in `SampleSpec.of_element`. To be multiplied by dL/dw_hat, and summed."""
        return signed_draw(p, self.noise, _word(p, element, key, clock), clock(1))

    def of_block(self, p: Primitives, total: Operand, amax: Operand, learned: Operand) -> Value:
        """float32, dL/db of a block, from the sum over its elements, its maximum and its width parameter."""
        b = width(p, learned(), self.rule)
        return p.fmul(p.fmul(total(), amplitude(p, b, amax())), -math.log(2.0))

    def of_parameter(self, p: Primitives, gradient: Value, parameter: Value) -> Value:
        """float32, dL/db_i, from dL/db summed over the blocks that have this parameter."""
        return width_gradient(p, gradient, parameter, self.rule)


@cache
def _of_place(place: int) -> tuple[int, int]:
    """What the two words of a key differ by at a place."""
    return key_words(0, f"place {place}")


def key_at(p: Primitives, key: Words, place: int) -> tuple[Value, Value]:
    """The words of a key at a place, see `SampleSpec.place`."""
    first, second = (p.ixor(key(word), _of_place(place)[word]) for word in range(2))
    return first, second


def _word(p: Primitives, element: Operand, key: Words, clock: Words) -> Value:
    return random_word(p, element(), (key(0), key(1)), clock(0))
