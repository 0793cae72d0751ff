"""Parquet files of pictures: the column that holds them, and their row groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..extras import needed
from .sources import filesystem, is_url, naming


def open_parquet(path: str) -> Any:
    """The file, opened by pyarrow. Raises ImportError without pyarrow, ValueError for another file."""
    with needed(f"{path}: reading parquet", "pyarrow", "'dinov3-lite[arrow]'"):
        import pyarrow
        import pyarrow.parquet
    try:
        if is_url(path):
            fs, inner = filesystem(path)
            with naming(path, pyarrow.ArrowInvalid):
                return pyarrow.parquet.ParquetFile(fs.open(inner, "rb"))
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole parquet file ({' '.join(str(error).split())})") from error


def picture_column(schema: Any, column: str | None, path: str) -> str:
    """The column of pictures: the one named, or the only one of bytes (Hugging Face's struct of them included).

    Raises ValueError that lists the columns.
    """
    import pyarrow.types as types

    columns = {field.name: str(field.type) for field in schema}
    listed = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    if column is not None:
        if column not in columns:
            raise ValueError(f"{path}: no column {column!r}: it has {listed}")
        if not (_is_bytes(kind := schema.field(column).type) or types.is_string(kind) or types.is_large_string(kind)):
            raise ValueError(f"{path}: column {column!r} has neither bytes nor paths: it has {listed}")
        return column
    binary = [field.name for field in schema if _is_bytes(field.type)]
    if len(binary) != 1:
        raise ValueError(f"{path}: which column holds the pictures? Name one by --column: {listed}")
    return binary[0]


def _is_bytes(kind: Any) -> bool:
    """Or Hugging Face's struct of them and a path."""
    import pyarrow.types as types

    hugging_face = types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}
    return types.is_binary(kind) or types.is_large_binary(kind) or hugging_face


def row_groups(file: Any, shard_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first group, group after the last, first row, rows): as many groups together as have `shard_size` rows at most.

    A larger group is not cut: reading a part of it would read the whole.
    """
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    first_group = first_row = rows = 0
    for group, size in enumerate(sizes):
        rows += size
        if group + 1 == len(sizes) or rows + sizes[group + 1] > shard_size:
            yield first_group, group + 1, first_row, rows
            first_group, first_row, rows = group + 1, first_row + rows, 0
