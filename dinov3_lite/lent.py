"""Weights that a prepared model holds packed alone, and gives out plain to whoever asks.

Threads may run a model and read its weights at once. A weight comes back, goes away and is looked for under one lock;
who reads takes what lies there, and the lock only if that is nothing. So nobody who reads misses a weight, and none is
lost. `plain` takes no lock: `unseen` may call it from another thread, for which the one that holds the lock waits.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .pages import give_back
from .pretrained import version
from .tracing import unseen

Unpack = Callable[[], Tensor]
_LOCK = threading.RLock()


class Lent(dict[str, Any]):
    """The parameters of a linear layer, of which `weight` may be away: packed elsewhere, and nowhere else.

    It comes back when somebody asks for it: as it was, if others hold it still, such as the model that this one was
    made of; else it is unpacked. Next time the model runs it goes away again, unless it was written to. What lies in a
    mapped file stays, and only its pages are given back.
    """

    weight: Tensor | None = None
    """What lies there, None while it is away."""
    _away: Unpack | None = None

    @classmethod
    def of(cls, linear: nn.Module) -> Lent:
        """The layer's parameters as `Lent`, into which plain ones are turned; the weight there now is the one lent."""
        with _LOCK:
            lent = vars(linear)["_parameters"]
            if not isinstance(lent, cls):
                lent = vars(linear)["_parameters"] = cls(lent)
            if not lent._is_there():
                lent._take(dict.__getitem__(lent, "weight"))
            return lent

    @staticmethod
    def undo(linear: nn.Module) -> None:
        """Give the layer plain parameters again, its weight among them."""
        with _LOCK:
            if isinstance(lent := vars(linear)["_parameters"], Lent):
                vars(linear)["_parameters"] = lent.copy()

    def _take(self, weight: Tensor) -> None:
        self.weight, self._away = weight, None
        self.alias = weight.detach()  # shares the count of changes, and holds no memory while the weight is away

    def lend(self, unpack: Unpack, packed: int) -> None:
        """Let go of the plain weight, which has been packed elsewhere; `unpack()` returns it when somebody asks.

        packed: the `version` that was packed. A weight that was written to or replaced since stays.
        """
        with _LOCK, torch.inference_mode(False), torch.no_grad():  # what inference mode makes counts no writes
            weight = self.weight
            if weight is None:
                self._away, self._version = unpack, packed
            elif self._is_there() and self.version() == packed and not (weight.is_inference() or give_back(weight)):
                self._storage = weakref.ref(weight.untyped_storage())
                self._where = weight.storage_offset(), weight.shape, weight.stride()
                self._away, self._version, self.weight = unpack, packed, None
                super().__setitem__("weight", None)
                self.alias.data = weight.new_empty(0)

    def version(self) -> int:
        """How often the weight was written to, whether it is there or away."""
        return version(self.alias)

    def watched(self) -> list[Tensor | None]:
        """Tensors by which a caller notices later that a parameter was replaced (it is another object) or written to
        (its version count is higher).

        A weight that only came back, because somebody asked for it, goes away again.
        """
        with _LOCK:
            if not self._is_there():
                return list(super().values())
            if self._away is not None and self.weight is not None:
                self.lend(self._away, self._version)
            return [self.alias, *(value for name, value in super().items() if name != "weight")]

    def _is_there(self) -> bool:
        """Whether nobody put another weight in the place of this one, or other data into it."""
        weight = super().get("weight")
        return weight is self.weight and (weight is None or weight.data_ptr() == self.alias.data_ptr())

    def plain(self) -> Tensor:
        """The plain weight; one that is away is taken from whoever else holds it or unpacked, and stays away."""
        weight = self.weight
        if weight is not None:
            return weight.detach()
        storage = self._storage()
        if storage is not None:
            return self.alias.new_empty(0).set_(storage, *self._where)
        if self.version() != self._version:
            raise RuntimeError(
                "weights were changed in the model that this one was prepared from, which was then dropped before "
                "this one ran: prepare the changed model, or keep it until this one has run"
            )
        assert self._away is not None
        return self._away()

    def _come_back(self) -> Any:
        with _LOCK:
            if self._away is not None and self.weight is None and super().get("weight") is None:
                unseen(self._unpack)
                super().__setitem__("weight", self.weight)
            return super().__getitem__("weight")

    def _unpack(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.alias.data = self.plain()
            self.weight = nn.Parameter(self.alias, requires_grad=False)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return self._come_back() if value is None and name == "weight" else value

    def get(self, name: str, default: Any = None) -> Any:
        value = super().get(name, default)
        return self[name] if value is None and name in self else value

    def setdefault(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else super().setdefault(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        with _LOCK:
            self.get(name)
            return super().pop(name, *default)

    def __delitem__(self, name: str) -> None:
        self.pop(name)

    def copy(self) -> dict[str, Any]:
        return {name: self[name] for name in list(self)}

    def items(self) -> Any:
        return self.copy().items()

    def values(self) -> Any:
        return self.copy().values()

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)
