"""What several layouts' cards share: the two JSON files of transformers', which may lie beside any weights, and the
README.md that model hubs show.
"""

from __future__ import annotations

from ...config import DINOv3Config
from .table import README_MARK, Beside, Card

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
NOTE_KEY = "dinov3_lite_note"


def read_foreign_card(beside: Beside) -> Card:
    """What transformers' two JSON files say, where they are there: of any layout but our own."""
    content = beside.files.get(CONFIG, {})
    config = None
    if "model_type" in content:
        try:
            config = DINOv3Config.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{beside.path(CONFIG)}: {error}") from error
    return Card(
        config=config,
        preprocessing=beside.files.get(PREPROCESSOR),
        license=beside.license,
        note=str(content.get(NOTE_KEY, "")),
    )


META = "dinov3-license"
META_LINK = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"


def readme(card: Card, library: str, use: str) -> str:
    """The model card of a folder that `library` reads: its front matter is what hubs index, the licence first.

    use: Python that loads the folder. https://huggingface.co/docs/hub/model-cards has the keys of the front matter.
    """
    head, licence = _licence(card.license)
    name = card.config.name if card.config else "DINOv3"
    note = f"The weights are {card.note}.\n\n" if card.note else ""
    return (
        f"---\n{head}library_name: {library}\npipeline_tag: image-feature-extraction\ntags:\n- dinov3\n---\n\n"
        f"{README_MARK}\n\n# {name}, for {library}\n\n{note}```python\n{use}\n```\n\n{licence}\n"
    )


def _licence(name: str) -> tuple[str, str]:
    """The lines of the front matter, and a sentence for people."""
    if name == META:
        said = f"The weights come under Meta's [DINOv3 licence]({META_LINK}), which applies to them in any layout."
        return f"license: other\nlicense_name: {META}\nlicense_link: {META_LINK}\n", said
    if name:
        return f"license: other\nlicense_link: {name}\n", f"The weights come under the licence in [{name}]({name})."
    said = "The source of these weights does not say under which licence they come: Meta's own have the DINOv3 licence."
    return "license: unknown\n", said
