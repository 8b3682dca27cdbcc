"""`Primitives` as C++ statements on the vectors of ``at::vec``, for several rows of a weight side by side.

A value is a tuple of C++ variables: one for each row, or a single one for all of them.
"""

from __future__ import annotations

from ...numerics.primitives import Value


class CppPrimitives:
    """`Primitives` whose operations write themselves down.

    Each operation is written for all rows before the next one is: what a processor then has in view are independent
    instructions, not one chain of them.

    Args:
        constants: C++ expression -> variable of the constants met so far, to be declared ahead of the statements.
    """

    def __init__(self, constants: dict[str, str]) -> None:
        self.statements: list[str] = []
        self._constants = constants

    def _constant(self, expression: str) -> Value:
        return (self._constants.setdefault(expression, f"c{len(self._constants)}"),)

    def _int(self, x: Value) -> Value:
        return self._constant(f"Ints(static_cast<int32_t>(0x{x & 0xFFFFFFFF:08x}u))") if isinstance(x, int) else x

    def _float(self, x: Value) -> Value:
        return self._constant(f"Floats({x.hex()}f)") if isinstance(x, float) else x

    def _write(self, expression: str, *operands: Value) -> Value:
        """``expression`` with its ``{}`` replaced by the operands, as the value of new variables."""
        rows = max(map(len, operands))
        number = len(self.statements)
        names = tuple(f"v{number + row}" for row in range(rows))
        for row, name in enumerate(names):
            of_row = (variables[row if len(variables) > 1 else 0] for variables in operands)
            self.statements.append(f"const auto {name} = {expression.format(*of_row)};")
        return names

    def iadd(self, x: Value, y: Value) -> Value:
        return self._write("{} + {}", self._int(x), self._int(y))

    def isub(self, x: Value, y: Value) -> Value:
        return self._write("{} - {}", self._int(x), self._int(y))

    def imul(self, x: Value, y: Value) -> Value:
        return self._write("{} * {}", self._int(x), self._int(y))

    def iand(self, x: Value, y: Value) -> Value:
        return self._write("{} & {}", self._int(x), self._int(y))

    def ior(self, x: Value, y: Value) -> Value:
        return self._write("{} | {}", self._int(x), self._int(y))

    def ixor(self, x: Value, y: Value) -> Value:
        return self._write("{} ^ {}", self._int(x), self._int(y))

    def ishr(self, x: Value, count: int) -> Value:
        # Signed integers shift arithmetically; the mask removes the copies of the sign.
        return self.iand(self._write("{} >> {}", x, self._int(count)), 0xFFFFFFFF >> count)

    def imin(self, x: Value, y: Value) -> Value:
        return self._write("at::vec::minimum({}, {})", self._int(x), self._int(y))

    def imax(self, x: Value, y: Value) -> Value:
        return self._write("at::vec::maximum({}, {})", self._int(x), self._int(y))

    def ilt(self, x: Value, y: Value) -> Value:
        return self._write("{} < {}", self._int(x), self._int(y))

    def iselect(self, mask: Value, x: Value, y: Value) -> Value:
        # Masks have all bits of an element set, or none. AVX512 has a bitwise operation of three operands; its blend
        # takes the mask in a register of another kind, and bringing it there takes as long again.
        return self._write("{0} ^ (({1} ^ {0}) & {2})", self._int(y), self._int(x), mask)

    def fadd(self, x: Value, y: Value) -> Value:
        return self._write("{} + {}", self._float(x), self._float(y))

    def fsub(self, x: Value, y: Value) -> Value:
        return self._write("{} - {}", self._float(x), self._float(y))

    def fmul(self, x: Value, y: Value) -> Value:
        return self._write("{} * {}", self._float(x), self._float(y))

    def fdiv(self, x: Value, y: Value) -> Value:
        return self._write("{} / {}", self._float(x), self._float(y))

    def fselect(self, mask: Value, x: Value, y: Value) -> Value:
        return self.bits_float(self.iselect(mask, self.float_bits(self._float(x)), self.float_bits(self._float(y))))

    def to_float(self, x: Value) -> Value:
        return self._write("at::vec::convert<float>({})", x)

    def float_bits(self, x: Value) -> Value:
        return self._write("at::vec::cast<int32_t>({})", x)

    def bits_float(self, x: Value) -> Value:
        return self._write("at::vec::cast<float>({})", x)
