"""What a layout is made of: equations between its tensors and the model's, and a card that says the rest.

A model family lists its tensors (`ModelTensor`), a layout's table only where it differs (`Row`). A row is an
equation: their tensors, one after the other along the first axis, hold what ours hold, one after the other. Names and
cuts in both directions follow from it. `{i}` in a name is the block's number; shapes are in letters that the family
reads off a config. Nothing here opens a file.
"""

# Annotations are evaluated here: as texts, those of NamedTuples are compiled at every import, half a millisecond.
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

README = "README.md"
README_MARK = "<!-- written by dinov3-lite: take this line out of a card that is to stay -->"

Shape = tuple[int, ...]
Named = list[tuple[str, Shape]]
Letters = tuple[str, ...]
Config = Any  # a frozen dataclass, one class a model family
Read = Callable[[str], Tensor]
"""A tensor of a file by its name in the file."""

HEADS = {
    *("head", "heads", "head_dist", "fc", "fc_norm", "classifier", "cls_head", "linear_head", "dino_head", "ibot_head"),
    *("projector", "projectors", "projection", "projection_head", "proj_head"),
}
"""What training code calls the modules that it puts on a backbone."""


class ModelTensor(NamedTuple):
    """One tensor of ours: its name in our own file, its shape, and the config switches it exists under."""

    name: str
    shape: Letters
    when: Mapping[str, bool] = MappingProxyType({})
    fused: int = 1
    """How many tensors of `shape` lie in it, one after the other along the first axis: 3 in qkv."""

    def exists(self, config: Config) -> bool:
        """Whether a model of that config has it."""
        return all(getattr(config, switch) == value for switch, value in self.when.items())


class Family(NamedTuple):
    """The models of one config class: their tensors in the order of the modules, and what a config says of them."""

    name: str
    """What its models are called, after "a"."""
    model_type: str
    """What transformers' config.json calls them."""
    loader: str
    """The class that users load them with."""
    tensors: tuple[ModelTensor, ...]
    sizes: Callable[[Config], Mapping[str, int]]
    """What the letters of shapes stand for."""
    numbers: Callable[[str, Config], list[dict[str, int]]]
    """What `{i}` in a name runs through: one empty dict for a name without it."""
    infer: Callable[["Table", Mapping[str, Shape], Read], Config]
    """The config of tensors that come without one. Raises ValueError if it can't be told."""
    anchor: str
    """The tensor by which a backbone is found in a bigger model: what stands before it stands before all."""
    weight: str
    """The first projection, of the images: its dtype is that of the weights, its second axis their channels."""
    counts: tuple[str, ...]
    """The config fields that count modules and tokens, which may be dropped or appended."""
    unseen: tuple[str, ...]
    """The config fields that change what the model computes and that no tensor's name or shape shows."""

    def shape(self, letters: Letters, config: Config) -> Shape:
        """The shape that ("C", "F") stands for: digits stand for themselves."""
        sizes = self.sizes(config)
        return tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in letters)

    def shapes(self, config: Config) -> dict[str, tuple[Shape, int]]:
        """Shape and number of fused tensors of each tensor of a model by its name, in the order of the modules."""
        result = {}
        for tensor in self.tensors:
            if tensor.exists(config):
                first, *rest = self.shape(tensor.shape, config)
                for number in self.numbers(tensor.name, config):
                    result[tensor.name.format(**number)] = (first * tensor.fused, *rest), tensor.fused
        return result


class Row(NamedTuple):
    """Where a layout differs: `theirs`, one after the other, hold `ours`, one after the other.

    One of ours that a config lacks counts as zeros if the row holds another that exists: Meta's key bias.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shape: Letters | None = None
    """Of each of theirs; None: equal parts of ours along the first axis."""
    mask: str = ""
    """A tensor beside theirs, of its shape: where a file has it, readers multiply theirs by it. Written as ones, and as
    zeros for what the config lacks; not written where it lacks no key bias."""


class Assumed(NamedTuple):
    """What a layout does not store: the value that its readers take instead, and the words for it."""

    make: Callable[[Config], Tensor]
    reason: str


class Equation(NamedTuple):
    """One row for one block: (name, shape) of theirs and of ours, and the name of the mask beside theirs, if any."""

    theirs: Named
    ours: Named
    mask: str


@dataclass(eq=False, repr=False)
class Table:
    """How a layout stores the models of one family."""

    family: Family
    differences: tuple[Row, ...] = ()
    assumed: Mapping[str, Assumed] = field(default_factory=dict)
    """By our name: what it does not store."""
    carried: Mapping[str, str] = field(default_factory=dict)
    """Tensors that its files may hold and the model does not need, with the reason: our own file carries them along."""
    copies: Callable[[Config], Mapping[str, str]] = lambda config: {}
    """What is written as a copy of which of ours, unless the source has it among the carried."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """How names begin of tensors that its files may hold and nobody needs, with the reason."""
    stores_empty: bool = True
    """Whether a tensor without elements, register tokens where there are none, is written: where the class that loads
    it has no such parameter then, its strict loader refuses one."""

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row for each of the model's tensors that it stores, in the order of the model."""
        differing = {name: row for row in self.differences for name in row.ours}
        rows = [
            differing.get(tensor.name, Row((tensor.name,), (tensor.name,)))
            for tensor in self.family.tensors
            if tensor.name not in self.assumed
        ]
        return tuple(dict.fromkeys(rows))

    @functools.cached_property
    def patterns(self) -> frozenset[str]:
        """All names that it knows, with # for numbers."""
        return frozenset(pattern(name) for row in self.rows for name in (*row.theirs, row.mask) if name)

    @functools.cached_property
    def block_starts(self) -> frozenset[str]:
        """How the names of tensors in blocks begin."""
        return frozenset(name.split("{")[0] for row in self.rows for name in row.theirs if "{" in name)

    def reason_against(self, name: str) -> str:
        """Why a tensor that it does not know by its name is left out; empty for all others."""
        if pattern(name) in self.patterns:
            return ""
        if name.split(".")[0] in HEADS:
            return "a head, not the backbone"
        return next((reason for start, reason in self.left_out.items() if name.startswith(start)), "")

    def theirs(self, ours: str) -> tuple[str, ...]:
        """What it calls that tensor of ours; nothing where it does not store it, or only with others in one."""
        return next((row.theirs for row in self.rows if row.ours[0] == ours), ())

    def equations(self, config: Config, rows: Iterable[Row] | None = None) -> list[Equation]:
        """The rows that a config calls for, or these, block by block, with names and shapes filled in."""
        tensors = {tensor.name: tensor for tensor in self.family.tensors}
        result = []
        for row in self.rows if rows is None else rows:
            ours = [tensors[name] for name in row.ours]
            if any(tensor.exists(config) for tensor in ours):
                wholes = [self.family.shape(tensor.shape, config) for tensor in ours]
                wholes = [(shape[0] * t.fused, *shape[1:]) for t, shape in zip(ours, wholes, strict=True)]
                part = (sum(shape[0] for shape in wholes) // len(row.theirs), *wholes[0][1:])
                shape = self.family.shape(row.shape, config) if row.shape else part
                if not (numel(shape) or self.stores_empty):
                    continue
                for number in self.family.numbers(row.ours[0], config):
                    theirs = [(name.format(**number), shape) for name in row.theirs]
                    named = [(name.format(**number), whole) for name, whole in zip(row.ours, wholes, strict=True)]
                    result.append(Equation(theirs, named, row.mask.format(**number)))
        return result

    def masks(self, config: Config) -> dict[str, Tensor]:
        """The masks that are written beside fused biases: (3C,), ones but for the key bias, which the config lacks."""
        names = {equation.mask: equation for equation in self.equations(config) if equation.mask}
        if not names or config.key_bias:
            return {}
        ones = torch.ones(config.hidden_size, device="cpu")
        return {name: torch.cat((ones, torch.zeros_like(ones), ones)) for name in names}


class Card(NamedTuple):
    """What is said of weights beside their names, shapes and values. Empty: not said."""

    config: Config | None = None
    preprocessing: dict[str, Any] | None = None
    """The content of preprocessor_config.json."""
    license: str = ""
    """The name of the weights' licence: `dinov3-license`, or that of the file that holds it."""
    note: str = ""
    """A word of the checkpoint's maker on the weights, as the sample's "made, not trained"."""
    source_layout: str = ""
    """Of a converted file: the layout that it was converted from, and the digest of those weights."""
    source_digest: str = ""
    digest: str = ""
    """What the digest of the weights is to be."""
    rope: str = ""
    """Where the RoPE periods came from: "computed" from the config, or "stored" in the source."""


class Beside(NamedTuple):
    """A card as it lies beside the tensors: in the file's own metadata, in JSON files, in a licence file."""

    metadata: Mapping[str, str] = MappingProxyType({})
    files: Mapping[str, dict[str, Any]] = MappingProxyType({})
    """The content of the side files that there are, by name."""
    license: str = ""
    weights: Path = Path()
    """The file of weights, for messages."""
    readme: str = ""
    """The model card of its folder, written where nobody has put one; only its licence is ever read."""

    def path(self, name: str) -> Path:
        """Where a side file lies, for messages."""
        return self.weights.with_name(name)


class Layout(NamedTuple):
    """A way to store checkpoints: tables of names and cuts by config class, the container, the files, the card."""

    name: str
    tables: Mapping[type, Table]
    container: str
    """The suffix of its file of weights, which names the format of it."""
    files: tuple[str, ...]
    """What its file of weights is called in a folder, the first to look for first; `*` stands for any name."""
    read_card: Callable[[Beside], Card]
    """What a card says; raises ValueError that names the file."""
    write_card: Callable[[Card], Beside]
    """How it says a card: what it can't say is left away."""
    file_name: Callable[[Card, Collection[str]], str]
    """The name that its readers look for, by the card and the names of the tensors carried along."""
    side_files: tuple[str, ...] = ("config.json", "preprocessor_config.json")
    """The JSON files that its readers look for beside the weights."""
    is_folder: bool = False
    """Whether a checkpoint is a folder of files, and not the one file of weights."""
    is_sharded: bool = False
    """Whether big weights are cut into several files with an index."""
    needs_config: bool = False
    """Whether its files come with their config, which then holds whatever lies beside them."""
    keeps_float32: bool = False
    """Whether tensors that float16 is too narrow for may stay in float32: other readers expect one dtype."""
    in_memory: Mapping[str, str] = MappingProxyType({})
    """Other beginnings that its names have in memory, and those that they have in its files."""
    mark: str = ""
    """The key in a file's metadata by which its files say that they are its."""
    carries: str = ""
    """What it puts before the names of other layouts' tensors that it carries along; empty: it carries none."""

    def table(self, config: Config) -> Table:
        """How it stores models of that config."""
        return self.tables[type(config)]


@functools.lru_cache(maxsize=1024)
def pattern(name: str) -> str:
    """The name with # for each number and for each `{i}`: names of one row have one pattern."""
    return ".".join("#" if part.isdecimal() or part.startswith("{") else part for part in name.split("."))


def numel(shape: Shape) -> int:
    """How many elements a tensor of that shape has."""
    return math.prod(shape)


def masked(bias: Tensor, mask: Tensor, name: str) -> Tensor:
    """The bias times its mask, in the bias's dtype, as Meta's layer computes it at each forward.

    Raises ValueError that names the mask if it is of another shape or not a number everywhere.
    """
    if bias.shape != mask.shape:
        raise ValueError(
            f"tensor {name!r} has shape {tuple(mask.shape)}, but the bias that it masks {tuple(bias.shape)}"
        )
    if not mask.isfinite().all():
        raise ValueError(
            f"tensor {name!r} holds NaN or infinity, as in a model whose weights were neither initialised nor loaded: "
            "save it once they are"
        )
    return bias * mask.to(bias.dtype)
