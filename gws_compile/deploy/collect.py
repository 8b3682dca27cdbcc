"""What a model's weights are when it is deployed: `deployed_tensors`, of every tensor in its state."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..config import Config
from ..learned_bits.learned_widths import LearnedWidths
from ..learned_bits.summary import summarize
from ..learned_levels.learned_levels import LearnedLevels
from ..numerics.blocks import matrix_shape
from ..numerics.elements import ElementFormat
from ..numerics.sparsity import keep
from ..numerics.spec import SampleSpec
from ..ops.masks import WeightMask
from ..report.untraced import untraced_reason
from ..runtime.sampled_weights import sampling_of
from ..runtime.weight_slots import Slot
from ..settings.weight_settings import WeightSettings
from ..warning import GwsWarning
from ..weight_names import WRAPPERS


@dataclass(frozen=True, eq=False)
class DeployedWeight:
    """A weight that the compiled model casts.

    Attributes:
        name: its name in the model.
        settings: how it was trained.
        spec: its cast, without noise; ``spec.dtype`` is the one in which graphs read it. With levels that alone counts.
        batch_dims: see `gws_compile.numerics.blocks.matrix_shape`.
        formats: what its blocks are cast to.
        parameter: that of its learned widths, which are frozen, or its levels; None for a fixed width.
        embedded: it is the table of an embedding look-up too, which sees it as it is.
        shape: (matrices, rows, columns).
        note: what a reader of the export should know of it.
        mask: how it is known what of it is zero; None for a dense one.
        draw: number of the draw, of which the mask is.
    """

    name: str
    settings: WeightSettings
    spec: SampleSpec
    batch_dims: int
    formats: tuple[ElementFormat, ...]
    parameter: torch.Tensor | None
    embedded: bool
    shape: tuple[int, int, int]
    note: str = ""
    mask: WeightMask | None = None
    draw: int = 0

    @property
    def text(self) -> str:
        """Format, blocks and sparsity, for a table."""
        formats = "+".join(fmt.name for fmt in self.formats) if self.settings.learned else self.settings.name
        return f"{formats} {self.settings.block_text}{f', {self.sparsity}' if self.sparsity else ''}"

    @property
    def sparsity(self) -> str:
        """How sparse it is, as text; empty for a dense one."""
        return "" if self.mask is None else str(self.mask.sparsity)

    def as_read(self, w: torch.Tensor) -> torch.Tensor:
        """What graphs cast of the whole weight ``w``: in the dtype in which they read it, zero where it is masked."""
        w = w.detach().to(self.spec.dtype)
        return w if self.mask is None else keep(w, self.mask.of(w, self.draw))


@dataclass(frozen=True, eq=False)
class DeployedTensor:
    """A tensor of a model's state.

    Attributes:
        name: its key in the state, without the components of wrappers.
        tensor: itself, a DTensor where it is sharded.
        owner: the module that holds it; None where that is not known.
        attribute: its name there.
        weight: how the compiled model casts it; None for what it takes as it is.
        is_parameter: it is no buffer.
        reason: why the compiled model takes it as it is, of a weight of two or more dims; empty for others.
    """

    name: str
    tensor: torch.Tensor
    owner: nn.Module | None
    attribute: str
    weight: DeployedWeight | None
    is_parameter: bool
    reason: str = ""

    @property
    def is_table(self) -> bool:
        """Whether an embedding layer holds it."""
        return isinstance(self.owner, (nn.Embedding, nn.EmbeddingBag))


def deployed_tensors(
    model: nn.Module,
    slots: Iterable[Slot],
    learned: LearnedWidths | None,
    levels: LearnedLevels | None,
    config: Config,
    *,
    draw: int = 0,
) -> list[DeployedTensor]:
    """Every tensor of a model's state, each tied one under all its names.

    Args:
        model: without wrappers.
        slots: the weights that graphs were called with.
        learned: the learned widths; None where widths are fixed.
        levels: the trained levels; None where no weight is cast to some.
        config: the settings.
        draw: number of the current draw.

    Raises:
        ValueError: no weight of the model is cast; or learned widths are not frozen; or one graph casts a weight that
            another one multiplies by as it is, or keeps other elements of.
    """
    # Before anything else: FSDP2 then puts shards in the place of what it has gathered.
    state = model.state_dict(keep_vars=True)
    weights: dict[int, DeployedWeight] = {}
    reasons: dict[int, str] = {}
    for slot in slots:
        tensor = slot.tensor() if slot.is_alive() else None
        if tensor is not None and not tensor.is_meta:
            weight = _deployed(slot, tensor, learned, levels, draw)
            if weight is not None:
                weights[id(tensor)] = weight
            else:
                reasons[id(tensor)] = _reason(slot, config)
    found = []
    for key, value in state.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if not isinstance(value, torch.Tensor):
            warnings.warn(f"{name} is no tensor and is left out of the export", GwsWarning, stacklevel=4)
            continue
        owner, attribute = _owner(model, key)
        one = weights.get(id(value))
        # Under its name in this model, which may be a part of the one that was called.
        one = one if one is None or one.name == name else replace(one, name=name)
        found.append(
            DeployedTensor(
                name, value, owner, attribute, one, isinstance(value, nn.Parameter), reasons.get(id(value), "")
            )
        )
    if not any(tensor.weight for tensor in found):
        raise ValueError(
            f"no weight of this {type(model).__name__} has been rewritten by this backend, so there is nothing to "
            "export: call the model that was compiled with it once, or Backend.prepare(model, example), before "
            "export(); Backend.report() says why weights were left alone"
        )
    return found


def _reason(slot: Slot, config: Config) -> str:
    known = next((weight.reason for weight in slot.graphs if weight.reason is not None), None)
    return known or untraced_reason(slot, config)


def _owner(model: nn.Module, key: str) -> tuple[nn.Module | None, str]:
    path, _, attribute = key.rpartition(".")
    try:
        return model.get_submodule(path), attribute
    except AttributeError:
        return None, attribute


def _deployed(
    slot: Slot, tensor: torch.Tensor, learned: LearnedWidths | None, levels: LearnedLevels | None, draw: int
) -> DeployedWeight | None:
    sampled = sampling_of(slot)
    if sampled is None:
        return None
    left = next((weight for weight in slot.graphs if weight.reason is not None and weight.may_be_read), None)
    if left is not None:
        raise ValueError(
            f"{slot.known_as} is cast in one graph and left alone in another ({left.reason}): no file can hold both. "
            "Exclude it, or mend what is said there"
        )
    if any(weight.mask != sampled.mask for weight in slot.graphs if weight.reason is None):
        raise ValueError(
            f"{slot.known_as} is sparse along one side in one graph, and along the other, or not at all, in another: "
            "no file can hold both. Give it a rule with sparsity=None"
        )
    settings = sampled.sampled_as
    if settings.levels is None:
        spec = replace(settings.sample_spec(sampled.dtype), noise="none")
    else:
        spec = SampleSpec(settings.fmt, "none", None, None, None, sampled.dtype)
    batch_dims = sampled.reads[0].batch_dims
    parameter: torch.Tensor | None = None
    formats: tuple[ElementFormat, ...] = (settings.fmt,)
    note = ""
    if settings.levels is not None:
        assert levels is not None
        parameter = levels.parameters.current(slot, settings.levels, torch.device("cpu"))
    if settings.learned is not None:
        parameter, formats, note = _frozen_widths(slot, learned)
    return DeployedWeight(
        name=slot.path,
        settings=settings,
        spec=spec,
        batch_dims=batch_dims,
        formats=formats,
        parameter=parameter,
        embedded=any(weight.embedded for weight in slot.graphs),
        shape=matrix_shape(tuple(tensor.shape), batch_dims),
        note=note,
        mask=sampled.mask,
        draw=draw,
    )


def _frozen_widths(slot: Slot, learned: LearnedWidths | None) -> tuple[torch.Tensor, tuple[ElementFormat, ...], str]:
    found = None if learned is None else learned.parameters.find(slot)
    if learned is None or not learned.parameters.frozen or found is None:
        raise ValueError(
            f"the bit widths of {slot.known_as} are still learned (bits=LearnedBits(...)): call "
            "Backend.freeze_bits(), or freeze_bits(per_weight=True) for one format a weight, and train on a little, "
            "before export()"
        )
    rule = learned.parameters.rule
    used = sorted(set(rule.index(rule.widths(found.parameter)).reshape(-1).tolist()))
    formats = tuple(rule.formats[index] for index in used)
    parameter = found.parameter.detach().cpu()  # where weights are encoded
    if len(formats) == 1:
        return parameter, formats, ""
    of_weight = summarize({"": found}, rule)
    assert of_weight is not None
    average, stored = f"{of_weight.average:.2f}", f"{of_weight.stored_bytes:,}"
    note = f"at the widths of its blocks, {average} bits on average, it would be {stored} bytes"
    return parameter, formats, note
