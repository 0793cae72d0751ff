"""Hub ids, with the real huggingface_hub client in its own process against a hub on the loopback address."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import TINY, write_checkpoint
from hub_server import COMMIT, OTHER_COMMIT, Hub, serve

from convert import convert
from dinov3_lite import DINOv3ViT

REPO = "facebook/dinov3-vitb16-pretrain-lvd1689m"
LOAD = "from dinov3_lite import DINOv3ViT; print(DINOv3ViT.from_pretrained({repo!r}, {options}).weights_id)"


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = write_checkpoint(tmp_path / "repository", TINY)
    (folder / "README.md").write_text("not needed")
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    (folder / "LICENSE.md").write_text("DINOv3 License")
    return folder


@pytest.fixture
def run(tmp_path):
    """Run Python code or `-m` arguments against an endpoint, with a cache of its own."""

    def run(arguments: list[str] | str, endpoint: str = "http://127.0.0.1:9", **environment: str):
        command = ["-c", arguments] if isinstance(arguments, str) else ["-m", *arguments]
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.run(
            [sys.executable, *command],
            env={**clean, **settings, **environment},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    return run


def test_only_the_files_needed_are_downloaded_and_only_once(repository, run):
    hub = Hub({REPO: repository})
    with serve(hub) as endpoint:
        first = run(LOAD.format(repo=REPO, options=""), endpoint)
        assert first.returncode == 0 and first.stdout.startswith("transformers "), first.stderr
        fetched = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
        assert fetched == {"config.json", "preprocessor_config.json", "model.safetensors", "LICENSE.md"}
        hub.requests.clear()
        second = run(LOAD.format(repo=REPO, options=""), endpoint)
        assert second.stdout == first.stdout
        assert not [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    offline = run(LOAD.format(repo=REPO, options=""))
    assert offline.stdout == first.stdout, "a cached model works when the hub is away"
    assert run(LOAD.format(repo=REPO, options="local_files_only=True")).stdout == first.stdout
    assert run(LOAD.format(repo=REPO, options=""), HF_HUB_OFFLINE="1").stdout == first.stdout


def test_convert_and_images_take_hub_ids_too(repository, run, tmp_path):
    with serve(Hub({REPO: repository})) as endpoint:
        done = run(["convert", REPO, "--output", "converted"], endpoint)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "converted" / "dinov3_lite.safetensors").exists()
        assert (tmp_path / "converted" / "LICENSE.md").exists()
        code = f"from dinov3_lite import ImageProcessor; print(ImageProcessor.from_pretrained({REPO!r}).size)"
        assert run(code, endpoint).stdout.strip() == "(224, 224)"


def test_revision(repository, run):
    hub = Hub({REPO: repository})
    with serve(hub) as endpoint:
        assert run(LOAD.format(repo=REPO, options="revision='v2'"), endpoint).returncode == 0
        assert any(OTHER_COMMIT in path for _, path in hub.requests)
        assert not any(COMMIT in path for _, path in hub.requests)


def test_a_download_that_is_cut_goes_on_where_it_stopped(run, tmp_path):
    """Of a file larger than what the client writes at once (10 MB)."""
    big = replace(TINY, hidden_size=512, intermediate_size=2048, num_hidden_layers=3)
    hub = Hub({REPO: write_checkpoint(tmp_path / "big", big)}, cut_after=25_000_000)
    with serve(hub) as endpoint:
        done = run(LOAD.format(repo=REPO, options=""), endpoint)
        if done.returncode:  # releases differ in whether they try again by themselves
            done = run(LOAD.format(repo=REPO, options=""), endpoint)
    assert done.returncode == 0, done.stderr
    assert hub.cut_after is None
    starts = [int(r.removeprefix("bytes=").split("-")[0]) for r in hub.ranges]
    assert max(starts, default=0) >= 10_000_000, "what had arrived was not fetched again"


def test_a_token_opens_a_gated_repository(repository, run):
    with serve(Hub({REPO: repository}, gated=(REPO,))) as endpoint:
        assert run(LOAD.format(repo=REPO, options=""), endpoint, HF_TOKEN="hf_letmein").returncode == 0


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that `python -m convert` printed."""
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("convert: "), done.stderr
    return lines[0]


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_wrong"}], ids=["no token", "wrong token"])
def test_gated(repository, run, token):
    with serve(Hub({REPO: repository}, gated=(REPO,))) as endpoint:
        line = refusal(run(["convert", REPO], endpoint, **token))
    assert f"{REPO} is gated: accept its licence at {endpoint}/{REPO}" in line
    assert "hf auth login" in line and "timm/vit_base_patch16_dinov3.lvd1689m" in line


def test_not_found(repository, run):
    with serve(Hub({REPO: repository})) as endpoint:
        line = refusal(run(["convert", "someone/dinov3-nothing"], endpoint))
    assert (
        "someone/dinov3-nothing is neither a local file or folder nor a repository" in line and "hf auth login" in line
    )


def test_no_such_revision(repository, run):
    with serve(Hub({REPO: repository})) as endpoint:
        line = refusal(run(["convert", REPO, "--revision", "v9"], endpoint))
    assert f"{REPO} has no revision 'v9'" in line


def test_the_hub_or_its_mirror_is_away(run):
    line = refusal(run(["convert", REPO]))
    assert f"{REPO} is not in the cache" in line and "http://127.0.0.1:9" in line and "HF_ENDPOINT" in line


@pytest.mark.parametrize("how", ["variable", "argument"])
def test_offline(run, how):
    if how == "variable":
        line = refusal(run(["convert", REPO], HF_HUB_OFFLINE="1"))
    else:
        done = run(LOAD.format(repo=REPO, options="local_files_only=True"))
        line = done.stderr.splitlines()[-1]
    assert f"{REPO} is not in the cache" in line and "offline" in line


def test_a_repository_of_shards(run, tmp_path):
    """As the 7B's is: nothing but its index says which files there are."""
    whole = write_checkpoint(tmp_path / "whole", TINY)
    shards = convert(whole, tmp_path / "shards", to="transformers", max_shard_size=40_000)
    names = {file.name for file in shards.iterdir()} - {"README.md"}
    assert "model.safetensors.index.json" in names and len(names) > 4
    hub = Hub({REPO: shards})
    with serve(hub) as endpoint:
        done = run(LOAD.format(repo=REPO, options=""), endpoint)
    assert done.stdout.strip() == DINOv3ViT.from_pretrained(whole).weights_id, done.stderr
    fetched = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == names
    offline = run(["convert", REPO, "--output", "converted", "--quiet"])
    assert offline.returncode == 0, offline.stderr
