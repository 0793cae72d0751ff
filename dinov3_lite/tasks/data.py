"""Pictures and their masks on disk: pairs found by stem, masks decoded and checked, a part held out.

A data set is a folder with a folder of pictures and one of masks in it, under any of the names that the field uses
(`Image` and `GT`, `Imgs` and `GT`, `im` and `gt`, `images` and `masks`, ...). A mask is an 8-bit picture of its
picture's size: for one foreground any two values, or grey levels up to 255 (foreground is above 128, as
pysodmetrics has it); for several classes the classes' numbers, with 255 for what is not looked at.
"""

from __future__ import annotations

import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checkpoint.hub import own_files
from ..pixels import ORIENTATION_TAG, TURNS, open_file, opened, orientation

if TYPE_CHECKING:
    from PIL import Image

PICTURE_FOLDERS = ("image", "images", "img", "imgs", "im")
MASK_FOLDERS = ("gt", "gts", "mask", "masks")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IGNORE = 255  # in a mask of classes: a pixel that counts neither in the loss nor in a measure
THRESHOLD = 128  # a grey level above it is foreground


@dataclass(frozen=True)
class Pair:
    """A picture and its mask."""

    picture: Path
    mask: Path


def pictures_in(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by their stems, in order. Raises ValueError where two files have one stem."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
            stem = stem_of(file)
            if stem in found:
                raise ValueError(
                    f"{folder}: {found[stem].name} and {file.name} have one stem, by which pictures, masks and "
                    "predictions are matched: rename one of them"
                )
            found[stem] = file
    return found


def stem_of(file: Path) -> str:
    """A file's name without its ending; an accented letter is one character, which macOS writes as two."""
    return unicodedata.normalize("NFC", file.stem)


def folders_of(data: Path) -> tuple[Path, Path] | None:
    """The folder of pictures and the folder of masks in `data`; None where it has not both.

    Raises ValueError where it has several of a kind.
    """
    found = []
    for names in (PICTURE_FOLDERS, MASK_FOLDERS):
        folders = [f for f in sorted(data.iterdir()) if f.is_dir() and f.name.lower() in names]
        if len(folders) > 1:
            raise ValueError(
                f"{data}: holds the folders {' and '.join(f.name for f in folders)}: which of them is meant? "
                "Leave one, or rename the other"
            )
        found.extend(folders)
    return (found[0], found[1]) if len(found) == 2 else None


def find_pairs(data: str | os.PathLike[str]) -> list[Pair]:
    """The pairs of one data set, in the order of their stems.

    Raises FileNotFoundError where there are no such folders, ValueError for a picture or a mask without its partner.
    """
    data = Path(data)
    if not data.is_dir():
        raise FileNotFoundError(f"{data}: no such folder: expected one with pictures and masks in it")
    folders = folders_of(data)
    if folders is None:
        below = [str(f) for f in sorted(data.iterdir()) if f.is_dir() and folders_of(f)]
        hint = f": its folders {', '.join(below)} are data sets: give those that are meant" if below else ""
        raise FileNotFoundError(
            f"{data}: expected a folder of pictures ({', '.join(PICTURE_FOLDERS)}) and a folder of masks "
            f"({', '.join(MASK_FOLDERS)}) in it{hint}"
        )
    pictures, masks = (pictures_in(folder) for folder in folders)
    for these, those, what in ((pictures, masks, "mask"), (masks, pictures, "picture")):
        alone = [file for stem, file in these.items() if stem not in those]
        if alone:
            raise ValueError(
                f"{alone[0]}: has no {what} of its stem in {folders[what == 'mask']}{_and_more(alone)}: "
                "add what is missing or take these out"
            )
    if not pictures:
        raise ValueError(f"{folders[0]}: holds no picture ({', '.join(SUFFIXES)})")
    return [Pair(picture, masks[stem]) for stem, picture in pictures.items()]


def _and_more(files: Sequence[object]) -> str:
    return f" (and {len(files) - 1} more)" if len(files) > 1 else ""


def read_picture(file: Path) -> np.ndarray:
    """A picture as people see it, turned as its camera was held: (H, W, 3) uint8. ValueError if it is damaged."""
    with open_file(file) as image:
        _check_one_frame(image)
    with opened(file, channels=3) as picture:
        rows = picture.rows(0, picture.height)  # (3, H, W), float32 where it was more than 8 bits
    return rows.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def read_mask(file: Path, levels: bool = False) -> np.ndarray:
    """The values of a mask as they are stored, turned as its own EXIF says: (H, W) uint8.

    levels: of a palette of greys, the greys; else, as of a palette of colours, the numbers in the palette.

    Raises ValueError for a mask that is not 8-bit, for one in colours or in the alpha channel and for a damaged file.
    """
    with open_file(file) as image:
        from PIL.Image import Transpose

        _check_one_frame(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(f"is a mask of more than 8 bits ({image.mode}): save it with values 0 to 255")
        turn = TURNS.get(orientation(image))
        upright = image.transpose(Transpose[turn[0]]) if turn else image
        return _values(upright, levels)


def _values(image: Image.Image, levels: bool) -> np.ndarray:
    if image.mode in ("1", "L"):
        return np.array(image.convert("L"))
    colours = np.array(image.convert("RGB"))
    grey = not (colours != colours[..., :1]).any()
    if image.mode == "P" and not (levels and grey):
        return np.array(image)
    if not grey:
        raise ValueError("is a mask in colours: expected grey values or classes' numbers in one channel")
    alpha = np.array(image.getchannel("A")) if "A" in image.getbands() else colours
    if colours.min() == colours.max() and alpha.min() < alpha.max():
        raise ValueError("is a mask in the alpha channel, of one colour: save it as grey values in one channel")
    return colours[..., 0]


def _check_one_frame(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG in which a phone keeps a second picture
        raise ValueError(f"holds {frames} pictures, as an animation does: expected one")


def picture_size(file: Path) -> tuple[int, int]:
    """(height, width) of a picture as it is shown; its pixels are not read."""
    with open_file(file) as image:
        turned = image.getexif().get(ORIENTATION_TAG) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


@dataclass(frozen=True)
class Reading:
    """How the values of a data set's masks are read."""

    classes: int
    """1: one foreground, read as 0 or 1. More: the classes' numbers, and 255 for what is not looked at."""
    above: int = THRESHOLD
    """With one foreground: a value above this belongs to it."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Stored values -> (H, W) uint8: 0 and 1, or classes' numbers."""
        return values if self.classes > 1 else (values > self.above).astype(np.uint8)

    def of(self, file: Path) -> np.ndarray:
        """The mask in a file: (H, W) uint8, 0 and 1, or classes' numbers."""
        return self(read_mask(file, levels=self.classes == 1))


def read_masks(files: Sequence[Path], classes: int, masks: Iterable[np.ndarray] | None = None) -> Reading:
    """Look at all masks of a data set once, and tell how they are read.

    masks: their values, where they have been read already. Raises ValueError where the values leave open what is
    foreground, where a class has a number that is not below `classes`, and where there is one class only.
    """
    masks = masks or (read_mask(file, levels=classes == 1) for file in files)
    counts = [np.bincount(values.ravel(), minlength=256) for values in masks]
    present = np.array(counts) > 0  # (masks, 256)
    values = np.flatnonzero(present.any(0)).tolist()
    if classes > 1:
        return _as_classes(files, classes, present, values)
    if len(values) == 1:
        raise ValueError(f"{files[0].parent}: every pixel of every mask is {values[0]}: there is one class only")
    if len(values) == 2:
        return Reading(1, above=values[0])
    if values[-1] <= THRESHOLD:
        raise ValueError(
            f"{files[0].parent}: the masks hold the values {_listed(values)}: what is foreground? Write the masks with "
            f"0 and 255, or give the number of classes, {values[-1] + 1}"
        )
    two_valued = [file for file, row in zip(files, present, strict=True) if row[1] and not row[2:].any()]
    if two_valued:
        other = files[int(present[:, 2:].any(1).argmax())]
        raise ValueError(
            f"{two_valued[0]}: holds 0 and 1 only, and {other} values up to {values[-1]}: what is foreground? "
            "Write all masks with 0 and 255, or give the number of classes"
        )
    return Reading(1)


def _as_classes(files: Sequence[Path], classes: int, present: np.ndarray, values: list[int]) -> Reading:
    blurred = next((file for file in files if file.suffix.lower() in (".jpg", ".jpeg")), None)
    if blurred:
        raise ValueError(f"{blurred}: is a JPEG, which changes classes' numbers where they meet: save masks as PNGs")
    beyond = [value for value in values if classes <= value < IGNORE]
    if beyond:
        file = files[int(present[:, beyond[0]].argmax())]
        raise ValueError(
            f"{file}: holds the value {beyond[0]}, and {classes} classes have the numbers 0 to {classes - 1} "
            f"(255 is not looked at): give a larger number of classes or write the mask anew"
        )
    if len([value for value in values if value < classes]) < 2:
        raise ValueError(f"{files[0].parent}: the masks hold the values {_listed(values)}: there is one class only")
    return Reading(classes)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def check_pairs(pairs: Sequence[Pair], classes: int) -> tuple[Reading, list[Path]]:
    """Look at all masks of a training set once: how they are read, and those that are empty.

    Raises ValueError as `read_masks` does, and for a mask of another size than its picture.
    """

    def values() -> Iterator[np.ndarray]:
        for pair in pairs:
            mask, size = read_mask(pair.mask, levels=classes == 1), picture_size(pair.picture)
            if mask.shape != size:
                raise ValueError(
                    f"{pair.mask}: is {mask.shape[0]} x {mask.shape[1]} pixels and its picture {pair.picture}, turned "
                    f"as EXIF says, {size[0]} x {size[1]}: a mask must have its picture's size"
                )
            maxima.append(int(mask.max()))
            yield mask

    maxima: list[int] = []
    reading = read_masks([pair.mask for pair in pairs], classes, values())
    low = 0 if classes > 1 else reading.above
    return reading, [pair.mask for pair, most in zip(pairs, maxima, strict=True) if most <= low]


def masks_beside(folders: Iterable[Path]) -> list[Path]:
    """The masks of the data sets whose pictures these folders hold."""
    places = (Path(os.path.abspath(folder)) for folder in folders)
    data_sets = {place.parent for place in places if place.name.lower() in PICTURE_FOLDERS}
    below = (folder for data in data_sets for folder in data.iterdir() if folder.name.lower() in MASK_FOLDERS)
    return [file for folder in below if folder.is_dir() for file in folder.iterdir()]


def check_output(file: Path, inputs: Iterable[Path] = (), model: str | os.PathLike[str] | None = None) -> None:
    """Say before the work what would fail after it: raise OSError where `file` can't be written, ValueError as
    `check_overwriting` does.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}: make it first")
    if file.is_dir():
        raise IsADirectoryError(f"{file}: is a folder: name a file in it")
    check_overwriting([file], inputs, model)
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise OSError(f"{file}: can't be written: {error.strerror or error}") from error


def check_overwriting(
    outputs: Iterable[Path], inputs: Iterable[Path], model: str | os.PathLike[str] | None = None
) -> None:
    """Raise ValueError for an output that is, by whatever path, one of the inputs or one of the model's files. Others,
    such as those of an earlier run, may be overwritten.

    model: its folder, its file or its hub id, as commands are given it.
    """
    kept = {file.resolve(): "model's files" for file in (own_files(model) if model is not None else ())}
    kept |= {file.resolve(): "inputs" for file in inputs}
    for output in outputs:
        if kind := kept.get(output.resolve()):
            raise ValueError(f"{output}: is one of the {kind} and would be overwritten: give another name or folder")


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into those to train on and those held out, at least one of each, by chance.

    Raises ValueError for a share that is not between 0 and 1, and for fewer than two pairs.
    """
    if not 0 < share < 1:
        raise ValueError(f"held out is {share}: expected a share of the training set between 0 and 1")
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pair of picture and mask: expected at least 2, as one is held out for choosing")
    order = np.random.default_rng(seed).permutation(len(pairs))
    held = min(len(pairs) - 1, max(1, round(share * len(pairs))))
    return [pairs[i] for i in sorted(order[held:])], [pairs[i] for i in sorted(order[:held])]
