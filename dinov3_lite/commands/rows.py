"""A safetensors file that is written row by row, so that memory does not grow with their number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.containers import SAFETENSORS_DTYPES
from ..checkpoint.files import whole_files
from ..console import naming

CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


class RowWriter:
    """Tensors of equal rows, kept in a hidden folder beside `file` until `save` puts them together under its name.

    with RowWriter(file) as rows:
        rows.add({"cls_token": (C,), "feature_map": (C, h, w)})
        rows.save({"files": ...})

    The folder is removed at the end in any case. Raises OSError, which names the file, where it can't be written;
    ValueError for a row that is unlike the first.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = 0
        self.kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def __enter__(self) -> RowWriter:
        with naming(self.file):
            self.folder = TemporaryDirectory(prefix=f".{self.file.name}.", suffix=".tmp", dir=self.file.parent)
        self.spools: dict[str, Any] = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for spool in self.spools.values():
            spool.close()
        self.folder.cleanup()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors as they will be, by name."""
        return {name: (self.rows, *shape) for name, (_, shape) in self.kinds.items()}

    def add(self, row: dict[str, Tensor]) -> None:
        kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in row.items()}
        self.kinds = self.kinds or kinds
        if kinds != self.kinds:
            raise ValueError(f"{self.file}: row {self.rows} is {kinds}, those before {self.kinds}: expected equal ones")
        with naming(self.file):
            for name, tensor in row.items():
                if name not in self.spools:
                    self.spools[name] = (Path(self.folder.name) / name).open("w+b")
                self.spools[name].write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.rows += 1

    def save(self, metadata: dict[str, str]) -> None:
        """Write the file; it has its name only once it is whole."""
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, _) in self.kinds.items():
            start, end = end, end + self.spools[name].tell()
            header[name] = {"dtype": CODES[dtype], "shape": self.shapes[name], "data_offsets": (start, end)}
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % 8)
        whole = Path(self.folder.name) / self.file.name
        with naming(self.file), whole_files() as out:
            with open(whole, "xb") as output:
                output.write(len(content).to_bytes(8, "little") + content)
                for spool in self.spools.values():
                    spool.seek(0)
                    shutil.copyfileobj(spool, output, 2**20)
            out.adopt(whole, self.file)
