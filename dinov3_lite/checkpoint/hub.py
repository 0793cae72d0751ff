"""From a source to a local file or folder: a hub id is downloaded by huggingface_hub, imported when first needed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from .layouts import LAYOUTS
from .layouts.timm import ungated_copy
from .words import few, short

SIDE_FILES = sorted({name for layout in LAYOUTS.values() for name in layout.side_files})
# Weights: the first kind that a repository has. What Trainer leaves beside pytorch_model.bin is not fetched.
KINDS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    ("*.pth", "*.pt", "*.ckpt", "*.bin"),
)
WEIGHTS = {".safetensors", ".pth", ".pt", ".ckpt", ".bin"}
LICENCES = ("LICENSE*", "LICENCE*")
NAMES = {"README.md", "*.index.json", *SIDE_FILES, *LICENCES, *(n for layout in LAYOUTS.values() for n in layout.files)}
TIMM_NAME = re.compile(r"hf[-_]hub:(?://)?")  # how timm writes that a model is on the hub
UNGATED_LICENCE = "their LICENSE says Apache-2.0, lightly's documentation says that the DINOv3 licence applies too"


def locate(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local file or folder that `source` names, downloaded first if it is a hub id (also as timm's `hf-hub:...`).

    subfolder: where the checkpoint is within the source, folders separated by slashes; None: it is the source.
    Raises FileNotFoundError, in one sentence with the next step, if there is no such thing, ValueError if the subfolder
    is none within the source.
    """
    inside = _checked(subfolder)
    path, repo_id = Path(source), TIMM_NAME.sub("", os.fspath(source), count=1)
    if os.fspath(source) and path.exists():
        if not (path / inside).exists():
            raise FileNotFoundError(f"{path}: has no folder {short(subfolder)}")
        return path / inside
    if is_hub_id(repo_id):
        return download(
            repo_id, subfolder=subfolder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
    told = short(os.fspath(source))[1:-1]
    raise FileNotFoundError(f"{told}: no such file or folder, and no hub id (owner/name) either")


def _checked(subfolder: str | None) -> str:
    """The subfolder as a path that stays inside its source; "." for none."""
    inside = PurePosixPath(subfolder or ".")
    if inside.is_absolute() or ".." in inside.parts or "\\" in str(inside):
        raise ValueError(f"subfolder is {short(subfolder)}: expected a folder within the source, such as 'backbone'")
    return str(inside)


def own_files(source: str | os.PathLike[str]) -> list[Path]:
    """The local files that are a checkpoint's: all in its folder or, where its file is named, that one and those beside
    it that are called as a checkpoint's are. None of a hub id.
    """
    path = Path(source)
    if path.is_dir():
        return list(path.iterdir())
    return [path, *(f for f in path.parent.iterdir() if _matching([f.name], NAMES))] if path.is_file() else []


def is_hub_id(source: str) -> bool:
    """Whether it is of the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def download(
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder with that repository's checkpoint, downloaded unless the cache has it.

    Of the weights, the safetensors are fetched, or where there are none, PyTorch's files.
    Raises FileNotFoundError, in one sentence with the next step, if it can't be had.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    endpoint, inside = constants.ENDPOINT, _checked(subfolder)

    def snapshot(names: Iterable[str], here_only: bool, revision: str | None) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                local_files_only=here_only,
                allow_patterns=[name if inside == "." else f"{inside}/{name}" for name in names],
            )
        )

    def fetch() -> Path:
        if local_files_only or constants.HF_HUB_OFFLINE:
            return snapshot((), True, revision)
        try:
            repository = huggingface_hub.HfApi().model_info(repo_id, revision=revision)
        except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except Exception:  # the hub is away: the cache may do
            return snapshot((), True, revision)
        listed = [PurePosixPath(file.rfilename) for file in repository.siblings or ()]
        names = [path.name for path in listed if str(path.parent) == inside]
        weights = next((found for found in (_matching(names, kind) for kind in KINDS) if found), [])
        folders = sorted({str(path.parent) for path in listed if path.suffix in WEIGHTS} - {"."})
        if not weights and folders and inside == ".":
            raise _NotThere(f"{repo_id} has its weights in folders: name one of {few(folders)} as the subfolder")
        if not names:
            raise _NotThere(f"{repo_id} has no folder {short(subfolder)}: its weights are in {few(folders) or 'none'}")
        return snapshot([*weights, *_matching(names, (*SIDE_FILES, *LICENCES))], False, revision)

    try:
        folder = fetch() / inside
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {subfolder} of it in the cache")
        return folder
    except _NotThere:
        raise
    except errors.GatedRepoError as error:
        problem = (
            f"is gated: accept its licence at {endpoint}/{repo_id} and log in with `hf auth login` (or set HF_TOKEN)"
            f"{_ungated(repo_id)}"
        )
        raise FileNotFoundError(f"{repo_id} {problem}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} is neither a local file or folder nor a repository that you can see at {endpoint}: "
            "check the name, or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r}: name one of its branches, tags or commits"
        ) from error
    except Exception as error:  # the client's HTTP library, which its releases change, raises its own
        if local_files_only or constants.HF_HUB_OFFLINE:
            problem = "and this is offline: download it once without HF_HUB_OFFLINE and local_files_only"
        else:
            problem = (
                f"and {endpoint} can't be reached: check the path and the connection, or name a mirror with HF_ENDPOINT"
            )
        raise FileNotFoundError(f"{repo_id} is not in the cache, nor a local file or folder, {problem}") from error


class _NotThere(FileNotFoundError):
    """The hub was asked, and the repository has no such thing."""


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _ungated(repo_id: str) -> str:
    """What needs no request: timm's copy of the same weights, and others of this architecture."""
    copy = ungated_copy(repo_id)
    same = f"; timm's copy needs no request: {copy}" if copy else ""
    others = "robbyant/lingbot-vision-vit-{small,base,large}"
    return f"{same}; nor do {others}, other weights of this architecture ({UNGATED_LICENCE})"
