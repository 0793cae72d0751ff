"""Our own file: the model's tensors, in one safetensors file whose metadata says all there is to say.

The biases of queries, keys and values have names of their own in it, and one that the config lacks is not there. The
model has them in one parameter (`dinov3_lite.layers.QKVProjection`), and so has `STATE_DICT`: what
`torch.save(model.state_dict())` writes, what loading assigns and saving begins with. It is none to convert to.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from ...config import DINOv3Config, DINOv3ConvNeXtConfig, config_from_dict
from ..json_files import parse_json_object
from .cards import read_foreign_card
from .convnext import CONVNEXT
from .table import Beside, Card, Layout, Row, Table
from .vit import BIASES, QKV, VIT

FILE = "dinov3_lite.safetensors"
MARK = "dinov3_lite"
VERSION = "1"


def read_card(beside: Beside) -> Card:
    """The card in the file's metadata, or of a bare state dict what lies beside it.

    Raises ValueError if the metadata is of another release, or not what this library writes.
    """
    said = beside.metadata
    if MARK not in said:
        return read_foreign_card(beside)
    if said[MARK] != VERSION:
        raise ValueError(
            f"{beside.weights}: converted file of version {said[MARK]}, this release reads {VERSION}: convert again"
        )
    try:
        return Card(
            config=config_from_dict(parse_json_object(said["config"])),
            preprocessing=parse_json_object(said["preprocessing"]) if "preprocessing" in said else None,
            license=said.get("license", ""),
            note=said.get("note", ""),
            source_layout=said.get("source_layout", ""),
            source_digest=said.get("source_digest", ""),
            digest=said["digest"],
            rope=said.get("rope", ""),
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{beside.weights}: its metadata is not what this library writes ({error}): convert again"
        ) from error


def write_card(card: Card) -> Beside:
    """The metadata of a file."""
    metadata = {
        "format": "pt",
        MARK: VERSION,
        "config": json.dumps(card.config.to_dict()) if card.config else "",
        "source_layout": card.source_layout,
        "source_digest": card.source_digest,
        "digest": card.digest,
        "rope": card.rope,
    }
    if card.preprocessing is not None:
        metadata["preprocessing"] = json.dumps(card.preprocessing)
    if card.license:
        metadata["license"] = card.license
    if card.note:
        metadata["note"] = card.note
    return Beside(metadata=metadata)


def file_name(card: Card, carried: Collection[str]) -> str:
    """One name for all."""
    return FILE


LITE = Layout(
    name="lite",
    tables={DINOv3Config: Table(VIT), DINOv3ConvNeXtConfig: Table(CONVNEXT)},
    container=".safetensors",
    files=(FILE,),
    read_card=read_card,
    write_card=write_card,
    file_name=file_name,
    keeps_float32=True,
    mark=MARK,
    carries="carried.",
)
STATE_DICT = LITE._replace(
    tables={**LITE.tables, DINOv3Config: Table(VIT, (Row(BIASES, (f"{QKV}.bias",)),))},
    carries="",
)
