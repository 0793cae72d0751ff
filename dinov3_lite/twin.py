"""A faster stand-in for a module, and whether it still computes what the module would."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import Tensor, nn

from .layers import untouched
from .lent import Lent
from .pretrained import version


class Twin(NamedTuple):
    """A stand-in for a module, with the modules and weights that it was made from.

    Both compute the same for as long as those are in place and not written to.
    """

    stand_in: nn.Module
    modules: tuple[nn.Module, ...]
    parts: tuple[tuple[list[Any], list[int]], ...]

    @classmethod
    def of(cls, module: nn.Module, stand_in: nn.Module) -> Twin:
        """Pair a module with its stand-in, and remember its modules and weights, and how often each was written to."""
        modules = tuple(module.modules())
        return cls(stand_in, modules, tuple(map(_parts, modules)))

    def holds(self) -> bool:
        """Whether nothing in the module was replaced or written to since, and nobody observes it (`untouched`)."""
        if not untouched(*self.modules):
            return False
        for module, (parts, versions) in zip(self.modules, self.parts, strict=True):
            parts_now, versions_now = _parts(module)
            if len(parts) != len(parts_now) or versions != versions_now or not all(map(operator.is_, parts, parts_now)):
                return False
        return True


def _parts(module: nn.Module) -> tuple[list[Any], list[int]]:
    """A module's own children and weights, and how often each weight was written to."""
    parameters = vars(module)["_parameters"]
    held = parameters.watched() if isinstance(parameters, Lent) else parameters.values()
    weights: list[Tensor] = [weight for weight in held if weight is not None]
    return [*vars(module)["_modules"].values(), *weights], list(map(version, weights))
