"""What a forward saw, for when autograd runs it again inside backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.utils.weak import WeakIdKeyDictionary

from ..torch_internals.recomputation import regions
from .binding import Binding
from .clock import DrawState
from .weight_slots import Slot


@dataclass
class _Seen:
    """What the forward of a region saw of one weight.

    Attributes:
        states: of the clock, more than one where it saw the weight in different ways.
        reads: `Binding.reads` of the graphs that saw it.
    """

    states: set[DrawState] = field(default_factory=set)
    reads: set[frozenset[bool]] = field(default_factory=set)


class Recomputations:
    """Remembers, for each region that is computed again and for each weight, what the forward saw of the clock.

    A region is an activation checkpoint, or the call of an ``autograd.Function`` that calls the model in forward and
    again in backward (a re-entrant checkpoint, a reversible block). Its second run may come when the clock has gone on
    (another model's optimizer has stepped), or when noise is switched another way.
    """

    def __init__(self) -> None:
        self._by_region: WeakIdKeyDictionary = WeakIdKeyDictionary()  # token -> {Slot: _Seen}

    def remember(self, binding: Binding, state: DrawState) -> None:
        """Note what a forward with these weights sees."""
        for slot in binding.noisy:
            slot.seen = state
        for region in regions():
            seen: dict[Slot, _Seen] | None = self._by_region.get(region.token)  # type: ignore[no-untyped-call]
            if seen is None:
                self._by_region[region.token] = seen = {}
            for slot in binding.noisy:
                seen.setdefault(slot, _Seen()).states.add(state)
            for slot, reads in binding.reads.items():
                seen.setdefault(slot, _Seen()).reads.add(reads)

    def recall(self, binding: Binding) -> DrawState | None:
        """What the first run of the current region saw; None where no region on the stack was seen with the weights.

        Raises:
            RuntimeError: that region saw the weights in different ways, and it cannot be told which run this is; or it
                had noise where this run has none.
        """
        for region in regions():
            seen: dict[Slot, _Seen] | None = self._by_region.get(region.token)  # type: ignore[no-untyped-call]
            if seen:
                state = _state_of(binding, seen)
                _check_reads(binding, seen)
                if state is not None:
                    return state
        return None


def _state_of(binding: Binding, seen: dict[Slot, _Seen]) -> DrawState | None:
    states = {state for slot in binding.noisy if slot in seen for state in seen[slot].states}
    if len(states) > 1:
        raise RuntimeError(
            f"activation checkpointing runs a forward again that saw {_names(binding.noisy)} with different draws, or "
            "with noise and without: which of them this is cannot be told. Put the checkpoint around one of them"
        )
    return next(iter(states), None)


def _check_reads(binding: Binding, seen: dict[Slot, _Seen]) -> None:
    """Raise where the first run had gradients disabled as a whole: its graph has no regions of ``no_grad``."""
    other = [
        slot
        for slot, reads in binding.reads.items()
        if slot in seen and reads not in seen[slot].reads and any(state.enabled for state in seen[slot].states)
    ]
    if other:
        raise RuntimeError(
            f"a forward runs again inside backward, and reads {_names(other)} under no_grad, with the cast alone: "
            "in its first run, the whole of which had gradients disabled, these reads could not be told from others, "
            "and had noise. Use a checkpoint with use_reentrant=False, put the checkpoint inside the compiled region, "
            "or detach the weight instead of reading it under no_grad"
        )


def _names(slots: Iterable[Slot]) -> str:
    names = [slot.known_as for slot in slots]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
