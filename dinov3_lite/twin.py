"""A faster stand-in for a module, and whether it still computes what the module would."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .convnext import DepthwiseConv
from .layers import GatedMlp, LayerNorm, Mlp, SelfAttention, untouched
from .lent import Lent
from .pretrained import version

CONVOLUTION = operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode")

# The plain attributes that a stand-in is made by, of the classes that have any.
SETTINGS: dict[type, operator.attrgetter[Any]] = {
    LayerNorm: operator.attrgetter("normalized_shape", "eps"),
    SelfAttention: operator.attrgetter("num_heads", "head_dim"),
    Mlp: operator.attrgetter("act"),
    GatedMlp: operator.attrgetter("act"),
    **dict.fromkeys((nn.Conv2d, DepthwiseConv), CONVOLUTION),
}


class Twin(NamedTuple):
    """A stand-in for a module, with the modules within it and the weights that it was made from.

    Both compute the same for as long as those are in place and not written to. The module itself is not held here: who
    keeps its twin for as long as it lives, keeps neither any longer.
    """

    stand_in: nn.Module | None
    """None: nothing but the module itself."""
    within: tuple[nn.Module, ...]
    parts: tuple[tuple[list[Any], list[int]], ...]
    settings: list[Any]

    @classmethod
    def of(cls, module: nn.Module, stand_in: nn.Module) -> Twin:
        """Pair a module with its stand-in, and remember its modules and weights, and how often each was written to."""
        modules = tuple(module.modules())
        other = None if stand_in is module else stand_in
        return cls(other, modules[1:], tuple(map(_parts, modules)), settings_of(modules))

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing in the module was replaced, set anew or written to, and nobody observes it (`untouched`)."""
        modules = (module, *self.within)
        if not untouched(*modules) or self.settings != settings_of(modules):
            return False
        for part, (parts, versions) in zip(modules, self.parts, strict=True):
            parts_now, versions_now = _parts(part)
            if len(parts) != len(parts_now) or versions != versions_now or not all(map(operator.is_, parts, parts_now)):
                return False
        return True

    def refilled(self, module: nn.Module, made: nn.Module) -> nn.Module:
        """The stand-in, for which something was compiled, with the weights of one made anew; where they are of other
        kinds, the one made anew.
        """
        modules = tuple(module.modules())
        same = (self.within, self.settings) == (modules[1:], settings_of(modules))
        if self.stand_in is None or not same or _kinds(self.stand_in) != _kinds(made):
            return made
        for old, new in zip(self.stand_in.parameters(), made.parameters(), strict=True):
            old.data = new.data
        return self.stand_in


def settings_of(modules: Iterable[nn.Module]) -> list[Any]:
    """What somebody may set anew on a module without replacing anything."""
    return [SETTINGS[type(module)](module) for module in modules if type(module) in SETTINGS]


def _kinds(module: nn.Module) -> list[tuple[Any, ...]]:
    """What is compiled in of each parameter."""
    return [(name, p.shape, p.dtype, p.device) for name, p in module.named_parameters()]


def _parts(module: nn.Module) -> tuple[list[Any], list[int]]:
    """A module's own children and weights, and how often each weight was written to and where it lies."""
    parameters = vars(module)["_parameters"]
    held = parameters.watched() if isinstance(parameters, Lent) else parameters.values()
    weights: list[Tensor] = [weight for weight in held if weight is not None]
    # where each lies, since `.data = ` counts as no write; but what is lent comes and goes
    places = [] if isinstance(parameters, Lent) else [weight.data_ptr() for weight in weights]
    return [*vars(module)["_modules"].values(), *weights], [*map(version, weights), *places]
