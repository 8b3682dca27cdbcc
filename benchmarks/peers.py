"""What a user would otherwise take: noise and quantization of weights by other means, applied to a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

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


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"] = list(model.parameters())


def by_parametrization(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """`torch.nn.utils.parametrize` with `BlockNoise` on each linear layer."""
    for layer in linears(model):
        parametrize.register_parametrization(layer, "weight", BlockNoise())
    _train(model, optimizer)


def by_torchao(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Quantization-aware training of torchao: linear layers with a float8 fake-quantized weight.

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
    _train(model, optimizer)


class EmulatedMXLinear(nn.Module):
    """A linear layer whose three products torchao rounds to MXFP8, emulated in high precision."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x w^T + b``."""
        from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = self.weight.to(x.dtype)
        y = _to_mxfp8_then_scaled_mm(x, weight, KernelPreference.EMULATED, ScaleCalculationMode.FLOOR)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def by_torchao_mx(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """MXFP8 training of torchao in its emulated mode, the only one that a CPU or an older GPU has.

    Raises:
        Missing: no torchao, or one without it.
    """
    try:
        import torchao.prototype.moe_training.mxfp8_linear  # noqa: F401
    except ImportError as error:
        raise Missing("pip install torchao, 0.18 or later") from error
    chosen = {id(layer) for layer in linears(model)}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in chosen:
                layer = EmulatedMXLinear(child)
                if child.weight.device.type == "cpu":  # Inductor's C++ code knows no e8m0 scales (torch 2.11 to 2.15)
                    layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
                setattr(module, name, layer)
    _train(model, optimizer)


def by_diffq(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """DiffQ's hooks, which add noise to the parameters before each forward.

    Raises:
        Missing: no diffq.
    """
    try:
        import diffq
    except ImportError as error:
        raise Missing("pip install diffq (its licence is non-commercial)") from error
    quantizer = diffq.DiffQuantizer(model, group_size=8, min_size=0.0, exclude=["lm_head", "embed_tokens"])
    quantizer.setup_optimizer(optimizer)


PEERS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "parametrize": by_parametrization,
    "torchao": by_torchao,
    "torchao-mx": by_torchao_mx,
    "diffq": by_diffq,
}
