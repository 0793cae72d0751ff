"""Where a model's weights come from, whether they still are what they were there, and how they are saved again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from .pages import keep_heap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self

    from .checkpoint import Card, Checkpoint


class Opening(TypedDict, total=False):
    """Which weights of a source are meant, and how they are come by: what every way to load a model takes."""

    prefix: str | None
    """What stands before the names of the backbone that is meant, of several (None: see `checkpoint.choose`)."""
    num_channels: int | None
    """Of the images, if others than the checkpoint's."""
    channel_rule: str
    """How the first projection is then adapted: "repeat" or "mean", see `dinov3_lite.checkpoint.channels`."""
    subfolder: str | None
    """Of the source."""
    revision: str | None
    """Of a hub id, as in huggingface_hub; so are the next two."""
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool


def open_source(
    source: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    num_channels: int | None = None,
    channel_rule: str = "repeat",
    **place: Any,
) -> Checkpoint:
    """The opened checkpoint of a folder, a file or a hub id; its arguments are those of `Opening`.

    Raises FileNotFoundError and ValueError as `checkpoint.hub.locate` and `open_checkpoint` do.
    """
    from .checkpoint import open_checkpoint  # files and names are read when something is loaded, not with the network
    from .checkpoint.hub import locate

    opened = open_checkpoint(locate(source, **place), prefix=prefix)
    if num_channels is None:
        return opened
    from .checkpoint.channels import with_channels

    return with_channels(opened, num_channels, channel_rule)


class Pretrained(nn.Module):
    """Base of both architectures: where the weights came from (`weights_id`), and `save_pretrained`."""

    config: Any
    config_class: ClassVar[Any]
    card: Card | None = None
    """What was said of the weights where they were loaded from: preprocessing, licence, a note."""
    _origin: Origin | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        keep_heap()
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"config is a {type(config).__name__}: expected a {self.config_class.__name__}, as its from_name and "
                "from_dict make it; DINOv3ViT and DINOv3ConvNeXt take one kind each"
            )
        self.config = config

    @classmethod
    def from_name(cls, name: str, **config_changes: Any) -> Self:
        """A released variant with random weights; `config_changes` are fields of its config to replace.

        Raises ValueError for an unknown name or a contradictory config, TypeError for an unknown field.
        """
        return cls(replace(cls.config_class.from_name(name), **config_changes))

    @classmethod
    def from_checkpoint(
        cls,
        opened: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
        **switches: Any,
    ) -> Self:
        """The model of an opened checkpoint, in evaluation mode: see `from_pretrained` of the class.

        switches: the constructor's arguments beside the config. Raises ValueError if the checkpoint is another class's.
        """
        from .checkpoint import assign

        opened.check_family(cls.config_class)
        with WithoutWeights():
            model = cls(opened.config, **switches)
        if mesh is None:
            assign(model, opened, dtype=dtype, device=device)
        else:
            from .sharding.loading import assign_sharded

            assign_sharded(model, opened, mesh, dtype=dtype, device=device)
        samples = None if mesh else opened.state_samples(dtype)
        model._origin, model.card = Origin(opened.weights_id, model, samples), opened.card
        return model.eval()

    @property
    def weights_id(self) -> str:
        """Which weights these are: layout and digest of their checkpoint (`transformers 3f9a1c2e`), or "random".

        Says "changed since it was loaded" in place of the digest once training, merging or anything else has written to
        a weight (a change of single numbers through `.data` may go unseen). Dtype and device don't count.
        """
        return "random" if self._origin is None else self._origin.of(self)

    @weights_id.setter
    def weights_id(self, name: str) -> None:
        self._origin = Origin(name, self)

    def forget_origin(self, name: str) -> None:
        """Set `weights_id` to a name that later changes of the weights don't alter, and drop the checkpoint's card."""
        self._origin, self.card = Origin(name), None

    def extra_repr(self) -> str:
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return f"{self.config.name}, {millions:.1f} M parameters, weights {self.weights_id}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_origin("from a state dict")

    def save_pretrained(
        self, path: str | os.PathLike[str], layout: str = "lite", *, dtype: torch.dtype | None = None
    ) -> Path:
        """Write the weights as a checkpoint that `from_pretrained` and the converter read, and return its path.

        path: a folder, made if it is missing, or for a layout of one file its name. What lies there by the names of
            that layout is replaced; a folder of other weights, which loading it would take or refuse, is an error.
        layout: lite, transformers, meta or timm. dtype: of the weights; None keeps theirs.

        The config follows from the modules; preprocessing, licence and note are those of the checkpoint that the model
        was loaded from. Of a sharded model, all processes call this: tensor by tensor is gathered, and the first one of
        the mesh writes. Raises ValueError if its modules are not those of a model of its config (merge adapters first),
        or if the layout can't hold what they are.
        """
        if sharded_parameters(self):
            from .sharding.saving import save_sharded

            return save_sharded(self, Path(path), layout, dtype)
        from .checkpoint.saving import save_model

        return save_model(self, Path(path), layout, dtype)


class WithoutWeights(DeviceContext):
    """As `torch.device("meta")`, and parameters are not initialised either: for models that get all of theirs.

    PyTorch draws random numbers on the meta device by Python code, which takes longer than the modules themselves.
    """

    def __init__(self) -> None:
        super().__init__("meta")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_):  # what nn.Linear and nn.Conv2d call
            return kwargs["tensor"]
        return super().__torch_function__(func, types, args, kwargs)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which a part lies here; without importing what knows them."""
    return hasattr(tensor, "device_mesh")


def sharded_parameters(model: nn.Module) -> list[str]:
    """The names of those that lie in parts on the processes of a mesh."""
    return [name for name, parameter in model.named_parameters() if is_sharded(parameter)]


def version(parameter: Tensor) -> int:
    """How often it was written to; what torch does not count of inference tensors."""
    return 0 if parameter.is_inference() else parameter._version


class Origin:
    """The name of a model's weights, and what tells later whether it still has them.

    A change is noticed by a few numbers of each parameter, and by PyTorch's count of writes to it.
    model: None: the name stands, whatever becomes of the weights. samples: these numbers, where they have been read
        already: see `Checkpoint.state_samples`.
    """

    def __init__(
        self, name: str, model: nn.Module | None = None, samples: dict[str, list[Tensor | None]] | None = None
    ) -> None:
        self.name = name
        self.writes = {} if model is None else _writes(model)
        if samples is None:
            self.samples = {} if model is None else _samples(model)
        else:
            self.samples = {name: samples[name] for name in self.writes}

    def of(self, model: nn.Module) -> str:
        """The name, if the model's weights still are those; else its first word, and that they have changed."""
        return self.name if self._holds(model) else f"{self.name.split(' ')[0]}, changed since it was loaded"

    def _holds(self, model: nn.Module) -> bool:
        if not self.samples:
            return True
        if sharded_parameters(model):
            from .sharding.parameters import resharded

            resharded(model)
        here, writes = _here(model), _writes(model)
        offloaded = {name for name, parameter in model.named_parameters() if parameter.is_meta}
        if self.samples.keys() - offloaded != here.keys():
            return False
        for name, (tensor, count) in self.writes.items():
            now, count_now = writes[name]
            if tensor() is now() and count != count_now:
                return False
        return all(_has(tensor, self.samples[name]) for name, tensor in here.items())

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "samples": self.samples, "writes": {}}


def _samples(model: nn.Module) -> dict[str, list[Tensor | None]]:
    """A few numbers of each parameter."""
    from .checkpoint.spans import sample

    return {name: [sample(flat).cpu()] if flat.numel() else [] for name, flat in _here(model).items()}


def _here(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter, flat: of a DTensor the part in this process. Left out are those on the meta device and those of
    other classes of tensor.
    """
    result = {}
    for name, parameter in model.named_parameters():
        here: Any = parameter
        if is_sharded(here):
            here = here.to_local()
        if type(here) in (nn.Parameter, Tensor) and not here.is_meta:
            result[name] = here.detach().reshape(-1)
    return result


def _has(flat: Tensor, samples: list[Tensor | None]) -> bool:
    """Whether these are the numbers in each part of a tensor, in its dtype."""
    from .checkpoint.spans import same, sample

    parts = flat.chunk(max(1, len(samples))) if flat.numel() else ()
    return len(parts) == len(samples) and all(
        wanted is None or same(wanted.to(part.dtype), sample(part).cpu())
        for wanted, part in zip(samples, parts, strict=True)
    )


def _writes(model: nn.Module) -> dict[str, tuple[ReferenceType[Tensor], int]]:
    """Which tensor each parameter is, and how often it has been written to."""
    return {name: (ref(parameter), version(parameter)) for name, parameter in model.named_parameters()}
