"""From a source to a local file or folder: a hub id is downloaded by huggingface_hub, imported when first needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .layouts import LAYOUTS
from .layouts.timm import ungated_copy

SIDE_FILES = sorted({name for layout in LAYOUTS.values() for name in layout.side_files})
FILES = (*SIDE_FILES, "*.safetensors", "*.safetensors.index.json", "LICENSE*")


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local file or folder that `source` names, downloaded first if it is a hub id.

    Raises FileNotFoundError, in one sentence with the next step, if there is no such thing.
    """
    path = Path(source)
    if os.fspath(source) and path.exists():
        return path
    if is_hub_id(os.fspath(source)):
        return download(os.fspath(source), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    raise FileNotFoundError(f"{source}: no such file or folder, and no hub id (owner/name) either")


def is_hub_id(source: str) -> bool:
    """Whether it is of the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder with that repository's checkpoint, downloaded unless the cache has it.

    Raises FileNotFoundError, in one sentence with the next step, if it can't be had.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=list(FILES),
            )
        )
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


def _ungated(repo_id: str) -> str:
    """Where the same weights need no request, if timm has them."""
    copy = ungated_copy(repo_id)
    return f"; timm's copy needs no request: {copy}" if copy else ""
