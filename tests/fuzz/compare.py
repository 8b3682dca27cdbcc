"""How what was computed is held to what the oracle says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .case import Case
from .reads import Reads


class Mismatch(AssertionError):
    """The compiled model differs from the oracle.

    Attributes:
        what: what differs: ``"output"``, ``"loss"``, ``"gradient"``, ``"width gradient"``, ``"buffer"``, ``"names"``;
            ``"sample"``, the bits of what is multiplied by; ``"widths"``, the trained parameters; ``"refusal"``, an
            error that is promised.
    """

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{what}: {text}")
        self.what = what


def tolerance(case: Case) -> float:
    """The largest difference, as a share of the largest magnitude of what is compared.

    The same kernels run in eager torch and under ``aot_eager``, but a weight that several reads share has its gradients
    added up in another order, and so has an input; AOTAutograd also writes some backward formulas (attention, bilinear,
    products of vectors) with other kernels. Wrong noise moves an output by several percent: a draw at 10 bits by
    2^-9 of a block's maximum. In bfloat16 each product rounds to 2^-9, and Inductor does not round where it fuses.
    """
    if case.dtype == "bfloat16" or case.autocast or any("bfloat16" in part.form for part in case.parts):
        return 0.05 if case.settings.inner == "inductor" else 0.02
    return 1e-5


def compare(
    case: Case,
    what: str,
    name: str,
    actual: torch.Tensor | None,
    expected: torch.Tensor | None,
    scale: float | None = None,
) -> None:
    """Hold a tensor to what is expected, within the `tolerance`, of ``scale`` or else of the largest value.

    Raises:
        Mismatch: it differs.
    """
    if actual is None or expected is None:
        # A gradient of zeros and none at all are the same.
        other = expected if actual is None else actual
        if other is not None and other.abs().max() > 0:
            raise Mismatch(what, f"{name}: {'none' if actual is None else 'there is one'}, the other way expected")
        return
    actual = actual.detach()
    if actual.shape != expected.shape or (actual.dtype != expected.dtype and what != "width gradient"):
        raise Mismatch(what, f"{name}: {actual.shape}, {actual.dtype}; expected {expected.shape}, {expected.dtype}")
    difference = (actual.double() - expected.double()).abs().max().item()
    largest = max(expected.double().abs().max().item(), 1e-6) if scale is None else scale
    if not difference <= tolerance(case) * largest:
        raise Mismatch(what, f"{name}: off by {difference / largest:.2g} of the largest, {largest:.3g}")


def compare_samples(samples: Sequence[torch.Tensor], reads: Reads, *, all_of_them: bool) -> None:
    """Hold what was sampled to the oracle's values, bit for bit, and with ``all_of_them`` to be all of these.

    Raises:
        Mismatch: it differs.
    """
    hats = {hat.name: hat.value.detach() for hat in reads.hats.values()}
    for sample in samples:
        if not any(_same_bits(sample, value) for value in (*hats.values(), *reads.casts)):
            raise Mismatch("sample", f"a weight {tuple(sample.shape)} is not what the references say")
    for name, value in hats.items() if all_of_them else ():
        if not any(_same_bits(sample, value) for sample in samples):
            raise Mismatch("sample", f"{name} was not sampled")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
