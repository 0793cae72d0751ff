"""From a hub id to a local folder, by huggingface_hub, which is imported when it is first needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json", "LICENSE*")


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

    Raises FileNotFoundError, with the next step, if it can't be had.
    """
    import huggingface_hub
    from huggingface_hub import errors

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
        raise FileNotFoundError(
            f"{repo_id} is gated: accept its licence on its page on the hub, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} is neither a local file or folder nor a repository that you can see on the hub: "
            "check the name, or log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r}: name one of its branches or commits"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id} is no local file or folder, is not in the hub's cache, and could not be downloaded: "
            "check the path, or the connection (HF_ENDPOINT names a mirror)"
        ) from error
