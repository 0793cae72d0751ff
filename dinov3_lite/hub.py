"""From a hub id to a local folder, by huggingface_hub, which is imported when it is first needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json", "LICENSE*")

# How timm calls the variants; its copies of the weights are ungated.
TIMM_SIZES = {
    "vits16": "small", "vits16plus": "small_plus", "vitb16": "base", "vitl16": "large", "vith16plus": "huge_plus",
    "vit7b16": "7b",
}  # fmt: skip


def is_hub_id(source: str) -> bool:
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
    match = re.search(r"dinov3-(\w+)-pretrain-(\w+)$", repo_id)
    if not match or match[1] not in TIMM_SIZES:
        return ""
    return f"; timm's copy needs no request: timm/vit_{TIMM_SIZES[match[1]]}_patch16_dinov3.{match[2]}"
