"""What several layouts' cards share: the two JSON files of transformers', which may lie beside any weights, and the
README.md that model hubs show.
"""

from __future__ import annotations

import re
from typing import Any

from ...config import CONVNEXT_TYPE, MODEL_TYPE, config_from_dict
from .table import README_MARK, Beside, Card, Config

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
NOTE_KEY = "dinov3_lite_note"


def read_config(beside: Beside) -> Config:
    """The config in config.json. Raises ValueError that names the file if it is of another model."""
    try:
        return config_from_dict(beside.files[CONFIG])
    except ValueError as error:
        raise ValueError(f"{beside.path(CONFIG)}: {error}") from error


def read_foreign_card(beside: Beside) -> Card:
    """What transformers' two JSON files say, where they are there and about images and these models.

    They may lie beside weights of any layout but our own, and so may other models' files.
    """
    content, processing = beside.files.get(CONFIG, {}), beside.files.get(PREPROCESSOR)
    is_ours = content.get("model_type") in (MODEL_TYPE, CONVNEXT_TYPE)
    return Card(
        config=read_config(beside) if is_ours else None,
        preprocessing=processing if processing is not None and _is_of_images(processing) else None,
        license=beside.license,
        note=str(content.get(NOTE_KEY, "")),
    )


def _is_of_images(processing: dict[str, Any]) -> bool:
    """False for the preprocessing of speech, which is called the same."""
    images = {"image_processor_type", "image_mean", "image_std", "size"}
    return bool(processing.keys() & images) or not processing.keys() & {"feature_extractor_type", "sampling_rate"}


META = "dinov3-license"
META_LINK = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
KNOWN = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "fair-noncommercial-research-license")


def readme(card: Card, library: str, use: str) -> str:
    """The model card of a folder that `library` reads: its front matter is what hubs index, the licence first.

    use: Python that loads the folder. The keys are those of https://huggingface.co/docs/hub/model-cards.
    """
    licence, said = _licence(card.license)
    head = {**licence, "library_name": library, "pipeline_tag": "image-feature-extraction", "tags": "[dinov3]"}
    name = card.config.name if card.config else "DINOv3"
    note = f"The weights are {' '.join(card.note.split())}." if card.note else ""
    front = "\n".join(f"{key}: {value}" for key, value in head.items())
    parts = [f"---\n{front}\n---", README_MARK, f"# {name}, for {library}", note, f"```python\n{use}\n```", said]
    return "\n\n".join(filter(None, parts)) + "\n"


def _licence(name: str) -> tuple[dict[str, str], str]:
    """What the front matter says of the licence that a card names, and a sentence for people."""
    if not name:
        said = (
            "The source does not say under which licence these weights come. Meta's own come under the DINOv3 licence."
        )
        return {"license": "unknown"}, said
    if name == META:
        said = f"The weights come under Meta's [DINOv3 licence]({META_LINK}), in any layout."
        return {"license": "other", "license_name": META, "license_link": META_LINK}, said
    if name in KNOWN:
        return {"license": name}, f"The weights come under {name}, as their source says."
    word = re.sub(r"[^\w.-]+", "-", name)[:80]  # whoever made the source has written it
    if word.upper().startswith(("LICENSE", "LICENCE")):
        return {"license": "other", "license_link": word}, f"The weights come under the licence in [{word}]({word})."
    return {"license": "other", "license_name": word}, f"The weights come under {word}, as their source says."
