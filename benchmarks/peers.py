"""What a user would otherwise take: noise and quantization of weights by other means, applied to a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

Step = Callable[[], None]
BLOCK = 32
BITS = 5.0


class Missing(RuntimeError):
    """A peer's package is not installed."""


class BlockNoise(nn.Module):
    """``w + round(N(0, 1) / 2) * a * 2**(1 - b)``, written by hand, the noise without a gradient."""

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """A noisy weight."""
        if not self.training:
            return w
        rows, cols = w.shape
        blocked = w.detach().float().view(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
        amax = blocked.abs().amax((1, 3), keepdim=True)
        noise = torch.round(torch.randn_like(blocked) / 2) * amax * 2 ** (1 - BITS)
        return w + noise.view_as(w).to(w.dtype)


def linears(model: nn.Module) -> list[nn.Linear]:
    """The layers whose weights the backend rewrites too: all but the head."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]


def by_parametrization(model: nn.Module) -> None:
    """`torch.nn.utils.parametrize` with `BlockNoise` on each linear layer."""
    for layer in linears(model):
        parametrize.register_parametrization(layer, "weight", BlockNoise())


def by_torchao(model: nn.Module) -> None:
    """torchao's quantization-aware training: linear layers with a float8 fake-quantized weight.

    Raises:
        Missing: no torchao.
    """
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import Float8FakeQuantizeConfig, QATConfig
    except ImportError as error:
        raise Missing("pip install torchao") from error
    config = QATConfig(weight_config=Float8FakeQuantizeConfig(), step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)


def by_diffq(model: nn.Module) -> None:
    """DiffQ's hooks, which add noise to the parameters before each forward.

    Raises:
        Missing: no diffq.
    """
    try:
        import diffq
    except ImportError as error:
        raise Missing("pip install diffq (its licence is non-commercial)") from error
    diffq.DiffQuantizer(model, group_size=8, min_size=0.0, exclude=["lm_head", "embed_tokens"])


PEERS: dict[str, Callable[[nn.Module], None]] = {
    "parametrize": by_parametrization,
    "torchao": by_torchao,
    "diffq": by_diffq,
}
