"""The README.md in folders for transformers and timm: what hubs read of it, that its code runs, and whose it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import PREPROCESSING, TINY, run_python, run_reference, write_checkpoint

from convert import convert
from convert.__main__ import main
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.folders import read_license
from dinov3_lite.checkpoint.layouts import LAYOUTS
from dinov3_lite.checkpoint.layouts.table import Card
from dinov3_lite.sample import write_sample

FOLDERS = ("transformers", "timm")
META = {
    "license": "other",
    "license_name": "dinov3-license",
    "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
}
# The licence that a card names, what the front matter says of it, and what a reader of that alone knows.
LICENSES = {
    "dinov3-license": (META, "dinov3-license"),
    "apache-2.0": ({"license": "apache-2.0"}, "apache-2.0"),
    "": ({"license": "unknown"}, ""),
    "LICENSE.txt": ({"license": "other", "license_link": "LICENSE.txt"}, ""),
    "house-rules": ({"license": "other", "license_name": "house-rules"}, "house-rules"),
    "x\n---\nlicense: mit": ({"license": "other", "license_name": "x-----license-mit"}, "x-----license-mit"),
}


def front_matter(text: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


@pytest.mark.parametrize("name", LICENSES)
@pytest.mark.parametrize("layout", FOLDERS)
def test_hubs_read_the_licence(layout, name, tmp_path):
    said, read = LICENSES[name]
    text = LAYOUTS[layout].write_card(Card(config=TINY, license=name, note="made,\n# not trained")).readme
    head = front_matter(text)
    assert {key: value for key, value in head.items() if key.startswith("license")} == said
    assert head["library_name"] == layout and head["tags"] == ["dinov3"]
    assert "\nThe weights are made, # not trained.\n" in text
    (tmp_path / "README.md").write_text(text)
    assert read_license(tmp_path) == read


def test_a_licence_survives_without_its_text(tmp_path):
    """Meta's licence file lies beside the source; a lite file names it, and so does what is made of that."""
    source = write_checkpoint(tmp_path / "source", TINY)
    (source / "LICENSE.md").write_text("DINOv3 License Agreement")
    lite = convert(source, tmp_path / "together").rename(tmp_path / "alone.safetensors")
    folder = convert(lite, tmp_path / "folder", to="transformers")
    assert not (folder / "LICENSE.md").exists()
    assert open_checkpoint(convert(folder, tmp_path / "again")).card.license == "dinov3-license"


@pytest.mark.parametrize("layout", FOLDERS)
def test_the_code_of_a_card_runs(layout, tmp_path):
    write_sample(tmp_path / "sample")
    folder = convert(tmp_path / "sample", tmp_path / "out", to=layout, allow_loss=True)
    text = (folder / "README.md").read_text()
    assert "# vits16, for" in text and "\nThe weights are made, not trained.\n" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code += "\nprint(sum(p.numel() for p in model.parameters()))\n"
    if layout == "transformers":
        pytest.importorskip("transformers")
        assert run_python(code, cwd=folder).stdout.strip() == "21596544"
    else:
        (tmp_path / "code.py").write_text(code)
        # timm stores no mask token
        assert run_reference("run_with_timm.py", tmp_path / "code.py", cwd=folder).split()[-1] == "21596160"


def test_a_model_that_none_of_timms_can_be_is_loaded_by_us():
    text = LAYOUTS["timm"].write_card(Card(config=replace(TINY, proj_bias=False))).readme
    assert "DINOv3ViT.from_pretrained" in text and "create_model" not in text


def test_somebodys_card_stays_and_ours_is_made_anew(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "source", TINY, preprocessing=PREPROCESSING)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    options = [str(source), "--to", "transformers", "--output", str(folder), "--quiet"]
    assert main(options) == 0 and (folder / "README.md").read_text() == "# Mine\n"
    assert main([*options, "--force"]) == 0 and (folder / "README.md").read_text() == "# Mine\n"
    (folder / "README.md").unlink()
    assert main([*options, "--force"]) == 0
    assert front_matter((folder / "README.md").read_text())["license"] == "unknown"
    (source / "LICENSE").write_text("DINOv3 License")
    assert main([*options, "--force"]) == 0
    assert front_matter((folder / "README.md").read_text())["license_name"] == "dinov3-license"


def test_a_file_of_weights_gets_no_card(tmp_path):
    source = write_checkpoint(tmp_path / "source", TINY)
    for to in ("lite", "meta"):
        written = Path(convert(source, tmp_path / to, to=to, allow_loss=True))
        assert [file.name for file in (tmp_path / to).iterdir()] == [written.name]
