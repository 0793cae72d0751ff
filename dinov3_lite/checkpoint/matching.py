"""Which of the stored tensors are the backbone's, and which elements make up each of the model's: equations, held
against what files have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from .choose import choose, without_wrappers
from .containers import SAFETENSORS_DTYPES
from .layouts import backbones, model_tensors, own_names
from .layouts.table import Config, Shape, Table, masked, numel
from .spans import Span, StoredTensor, cut
from .words import few

DTYPES = tuple(SAFETENSORS_DTYPES.values())
ONE_MODEL = "weights and config must be of one model"


def backbone(stored: dict[str, StoredTensor], prefix: str | None) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of the backbone that is meant, under its own names, and what else the files hold."""
    stored = _renamed((without_wrappers(name), tensor) for name, tensor in stored.items())
    found = backbones(stored)
    if not found and prefix is not None:
        raise ValueError(f"has no backbone under {prefix!r}, nor under another prefix")
    chosen = choose(found, prefix) if found else ""
    own = own_names(stored, chosen)
    outside = {name: f"outside of {chosen!r}" for name in stored if name not in own}
    return _renamed((own[name], stored[name]) for name in own), outside


def _renamed(tensors: Iterable[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Tensors by their new names. Raises ValueError if two have the same."""
    result: dict[str, StoredTensor] = {}
    for name, tensor in tensors:
        if name in result:
            raise ValueError(f"tensor {tensor.name!r} is also there as {result[name].name!r}: remove one")
        result[name] = tensor
    return result


def match(file: Path, table: Table, config: Config, stored: dict[str, StoredTensor]) -> dict[str, list[Span]]:
    """The stored elements that make up each of the model's tensors.

    Raises ValueError if a tensor is missing, left over, misshapen, or holds what the config says there is not.
    """
    the_config = f"the config ({config.name})"
    equations = table.equations(config)
    expected = {name: shape for equation in equations for name, shape in equation.theirs}
    expected |= {e.mask: e.theirs[0][1] for e in equations if e.mask in stored}
    empty = {name for name, shape in expected.items() if not numel(shape)}  # a file may have it or not
    if missing := expected.keys() - stored.keys() - empty:
        raise ValueError(f"{file}: lacks {_listed(missing)}, which {the_config} calls for: {ONE_MODEL}")
    if extra := stored.keys() - expected.keys():
        raise ValueError(f"{file}: holds {_listed(extra)}, which {the_config} has no place for: {ONE_MODEL}")
    for name in expected.keys() - empty:
        _check_readable(stored[name])
    misshapen = [name for name, shape in expected.items() if name in stored and stored[name].shape != shape]
    if misshapen:
        shapes_found = ", ".join(
            f"{name!r} has shape {stored[name].shape}, not {expected[name]}" for name in misshapen[:5]
        )
        more = f" and {len(misshapen) - 5} more of other shapes" if len(misshapen) > 5 else ""
        raise ValueError(f"{stored[misshapen[0]].file}: against {the_config}, tensor {shapes_found}{more}: {ONE_MODEL}")

    shapes: dict[str, Shape] = {name: shape for name, (shape, _) in model_tensors(config).items()}
    spans: dict[str, list[Span]] = {}
    for equation in equations:
        theirs = [_masked(file, stored, name, equation.mask).span() for name, _ in equation.theirs if name not in empty]
        runs = cut(theirs, [numel(shape) for _, shape in equation.ours]) if len(equation.ours) > 1 else [theirs]
        lacks_mask = bool(equation.mask) and equation.mask not in stored
        for (name, _), run in zip(equation.ours, runs, strict=True):
            if name in shapes:
                spans[name] = run
            # a key bias without its mask acts in no model of a config that has none: it was masked in training
            elif not (lacks_mask and name.endswith("k_bias")) and any(part.read().any() for part in run):
                raise ValueError(
                    f"{file}: tensor {equation.theirs[0][0]!r} holds a {name.rsplit('.')[-1]} that is not zero, "
                    f"which {the_config} says the model lacks: {ONE_MODEL}"
                )
    for pattern, assumed in table.assumed.items():
        for number in table.family.numbers(pattern, config):
            if (name := pattern.format(**number)) in shapes:
                spans[name] = [StoredTensor.in_memory(name, assumed.make(config)).span()]
    return {name: spans[name] if numel(shape) else [] for name, shape in shapes.items()}


def _masked(file: Path, stored: dict[str, StoredTensor], name: str, mask: str) -> StoredTensor:
    """The tensor times its mask, where the file has one that changes more than a key bias of zeros."""
    tensor = stored[name]
    if mask not in stored:
        return tensor
    try:
        product = masked(tensor.read(), stored[mask].read(), mask)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return tensor if torch.equal(product, tensor.read()) else StoredTensor.in_memory(name, product, tensor.file)


def _check_readable(tensor: StoredTensor) -> None:
    """ValueError unless it is a plain tensor of floating-point numbers."""
    if tensor.problem:
        raise ValueError(f"{tensor.file}: tensor {tensor.name!r} {tensor.problem}")
    if tensor.dtype not in DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, expected one of {expected}")


def _listed(names: Collection[str]) -> str:
    return f"tensor{'s' * (len(names) > 1)} {few(sorted(names))}"
