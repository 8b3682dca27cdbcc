"""Which weight is which: a unique name for each weight that draws, given when compiled graphs are called."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence

from ..warning import GwsWarning
from ..weight_names import first_free, numbered, stage_prefix_of, without_number
from .weight_slots import Slot


class WeightRegistry:
    """Names the weights that draw noise, or have learned widths.

    One compiled graph may serve many layers, so nothing about a layer is in the graph. A weight has its name in the
    outermost module that is being called, or else its name in the graph (see `WeightSlots`). Where several have the
    same (models that share a backend, copies of a model), the first one seen has that name, the next ones ``name#1``,
    ``name#2`` in the order of first use, which is the same in every process that runs the same program. A tied weight
    has one name.

    Behind a loaded state, weights take the names that the saved run had for them, in the same order: the weights of a
    copy that has taken the place of its original, which was ``name#1`` there, are ``name#1`` again.
    """

    def __init__(self) -> None:
        self._named: dict[str, Slot] = {}  # in the order of first use
        self._used: dict[str, int] = {}
        self._saved: dict[str, tuple[int, ...]] | None = None
        self._lock = threading.RLock()

    def register(self, slots: Sequence[Slot]) -> None:
        """Name the weights that have no name yet, in this order.

        Raises:
            ValueError: a weight that is new has another shape than the loaded state says.
        """
        with self._lock:
            for slot in slots:
                if slot.name is None:
                    self._add(slot)

    def _add(self, slot: Slot) -> None:
        count = self._used.get(slot.path, 0)
        saved = [name for name in self._saved or () if without_number(name) == slot.path]
        unique = numbered(slot.path, count)
        if saved:
            unique = saved[count] if count < len(saved) else first_free(slot.path, {*saved, *self._named})
        self._check(unique, slot.shape, self._saved)
        self._used[slot.path] = count + 1
        self._named[unique] = slot
        slot.name = unique

    def __iter__(self) -> Iterator[Slot]:
        """The weights that have a name, in the order in which they got it; those that have gone too."""
        return iter(list(self._named.values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every weight that is alive, and of those of a loaded state that are still to come."""
        if any(slot.name != slot.path for slot in self._named.values()):
            gc.collect()  # of an original and its copies, none that is gone, on any rank
        live = {name: slot.shape for name, slot in self._named.items() if slot.is_alive()}
        gone = self._named.keys() - live.keys()
        return {**{name: shape for name, shape in (self._saved or {}).items() if name not in gone}, **live}

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold the weights that are alive to the names and shapes of a saved run, if it had any; nothing is changed.

        A `GwsWarning` for each that is not among them.

        Raises:
            ValueError: a weight has another shape.
        """
        live = [(name, slot.shape) for name, slot in self._named.items() if slot.is_alive()]
        for name, shape in sorted(live, key=lambda one: one[0] not in shapes):  # errors before warnings
            self._check(name, shape, shapes)

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold the weights to come to the names and shapes of a saved run, if it had any, as `check_shapes` does."""
        self._saved = dict(shapes) or None

    def _check(self, name: str, shape: tuple[int, ...], saved_shapes: Mapping[str, tuple[int, ...]] | None) -> None:
        """Hold a weight to what a saved run says of it; a `GwsWarning` where that is nothing.

        Args:
            name: its unique name.
            shape: its whole shape.
            saved_shapes: those of the saved run, if any.

        Raises:
            ValueError: the saved run had it in another shape.
        """
        if not saved_shapes:
            return
        saved = saved_shapes.get(name)
        stage = stage_prefix_of(name)
        if saved is None and stage and not any(n.startswith(stage) for n in saved_shapes):
            return  # the state of another pipeline stage: a shared checkpoint holds that of one rank
        if saved is None:
            warnings.warn(
                f"{name} is not among the weights of the loaded state: it draws noise of its own, which the saved run "
                "did not draw (is the model, or the way it is called, another one?)",
                GwsWarning,
                stacklevel=2,
            )
        elif saved != shape:
            raise ValueError(f"the state was saved with {name} of shape {saved}, this model has it of shape {shape}")
