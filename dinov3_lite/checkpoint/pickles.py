"""The pickle inside PyTorch's files, read as a list of instructions: nothing that it names is imported or called.

What torch.save writes of tensors, dictionaries, lists, numbers and texts needs some forty instructions and a dozen
names (`torch._utils._rebuild_tensor_v2` and its like). A file that asks for more is refused. Work and memory are
bounded by the size of the file: no instruction copies what another has built.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pickle import UnpicklingError
from typing import Any

import torch


@dataclass(frozen=True)
class Storage:
    """A block of bytes that tensors share: what the pickle says of it. Where it lies is the container's business."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor as it was saved: a strided view of a storage, counted in elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """One beyond the last element of the storage that the tensor takes."""
        if 0 in self.shape:
            return self.start
        return self.start + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in order and without gaps."""
        expected = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return self.numel == 0 or all(
            n == 1 or step == e for n, step, e in zip(self.shape, self.stride, expected, strict=True)
        )


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that is no strided block of bytes."""

    kind: str


def read_pickle(stream: Any) -> tuple[Any, dict[str, Storage]]:
    """The object that the pickle at the stream's position builds, and the storages that it names by their keys.

    stream: anything with `read` and `readline`; it is left behind the pickle.

    Dictionaries of any kind become plain, tensors SavedTensor or OtherTensor. Raises pickle.UnpicklingError that names
    the first thing in it that is neither tensors nor plain data, and anything else if it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    instruction: Any
    for instruction in pickletools.genops(stream):
        opcode, arg, _ = instruction
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case name if name in _CONSTANTS:
                stack.append(arg)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                items = since_mark()
                _expect(stack[-1], list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key], [value])
            case "SETITEMS":
                items = since_mark()
                _set_items(stack[-1], items[::2], items[1::2])
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_Global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_Global(*(_expect(part, str) for part in stack[-2:]))]
            case "REDUCE":
                arguments = _expect(stack.pop(), tuple)
                stack[-1] = _expect(stack[-1], _Global).call(arguments)
            case "BUILD":
                stack.pop()  # the attributes of a dictionary, such as a state dict's `_metadata`
                _expect(stack[-1], (dict, SavedTensor, OtherTensor))
            case "BINPERSID":
                storage = _storage(stack.pop())
                storages[storage.key] = storage
                stack.append(storage)
            case "NEWOBJ" | "NEWOBJ_EX" as name:
                raise UnpicklingError(_expect(stack[-2 if name == "NEWOBJ" else -3], _Global).path)
            case name:
                raise UnpicklingError(f"the instruction {name}")
    return stack.pop(), storages


_CONSTANTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for. Only the names in `_MEANINGS` can be called, and none is imported."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """As in an import."""
        return f"{self.module}.{self.name}"

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that is meant by `torch.FloatStorage` or `torch.float32`; uint8 for an untyped storage."""
        name = _STORAGES.get(self.name, self.name)
        dtype = getattr(torch, name, None) if self.module in ("torch", "torch.storage") else None
        return dtype if isinstance(dtype, torch.dtype) else None

    def call(self, arguments: tuple[Any, ...]) -> Any:
        meaning = _MEANINGS.get(self.path)
        if meaning is None:
            raise UnpicklingError(self.path)
        return meaning(*arguments)


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where the format has another object")
    return value


def _set_items(target: Any, keys: list[Any], values: list[Any]) -> None:
    """Keys are numbers and texts: hashing a tuple of tuples may take longer than the age of the universe."""
    for key, value in zip(keys, _expect(values, list), strict=True):
        if not isinstance(key, (str, bytes, int, float, type(None))):
            raise UnpicklingError(f"a dictionary with a {type(key).__name__} as its key")
        _expect(target, dict)[key] = value


def _storage(record: Any) -> Storage:
    """("storage", type, key, location, number of elements), in old files with a view of another storage behind."""
    if _expect(record, tuple)[:1] == ("module",):  # before the archive, torch.save kept modules' source code
        raise UnpicklingError("a module")
    kind, storage_type, key, _, numel, *view = record
    dtype = _expect(storage_type, _Global).dtype
    if kind != "storage" or dtype is None or any(part is not None for part in view):
        raise ValueError("an unknown kind of storage")
    return Storage(_text(key), dtype, _count(numel) * dtype.itemsize)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else _expect(value, str)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} where a size is expected")
    return value


def _tensor(storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> SavedTensor:
    """torch._utils._rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, hooks, metadata)."""
    shape, stride = (tuple(_count(n) for n in _expect(sizes, tuple)) for sizes in (shape, stride))
    if len(shape) != len(stride):
        raise ValueError(f"a tensor of {len(shape)} sizes and {len(stride)} strides")
    return SavedTensor(_expect(storage, Storage), storage.dtype, _count(start), shape, stride)


def _tensor_of_dtype(storage: Any, start: Any, shape: Any, stride: Any, *others: Any) -> SavedTensor:
    """torch._utils._rebuild_tensor_v3: dtypes that have no storage of their own."""
    _grad, _hooks, dtype, *_ = others
    found = _expect(dtype, _Global).dtype
    if found is None:
        raise ValueError(f"{dtype.name} where a dtype is expected")
    return replace(_tensor(storage, start, shape, stride), dtype=found)


def _with_attributes(rebuild: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with Python attributes, which are left."""
    return _expect(rebuild, _Global).call(_expect(arguments, tuple))


def _empty_dictionary(*items: Any) -> dict[Any, Any]:
    if items:  # torch.save fills them item by item; copying one again and again would outgrow the file
        raise UnpicklingError("a dictionary made from another object")
    return {}


def _other(kind: str) -> Callable[..., OtherTensor]:
    return lambda *_: OtherTensor(kind)


_MEANINGS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dictionary,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch._utils._rebuild_sparse_tensor": _other("sparse"),
    "torch._utils._rebuild_qtensor": _other("quantized"),
    "torch._utils._rebuild_nested_tensor": _other("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _other("without data"),
    "torch._utils._rebuild_wrapper_subclass": _other("of a class of its own"),
    "torch._utils._rebuild_device_tensor_from_numpy": _other("saved through numpy"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _other("saved by another device"),
    "torch.serialization._get_layout": lambda name: name,
    "torch.Size": lambda sizes=(): _expect(sizes, tuple),
    "torch.device": lambda *where: where,
    "_codecs.encode": lambda text, _encoding: text,
}

_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8"},
    **{"ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64"},
    **{"QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32"},
}
