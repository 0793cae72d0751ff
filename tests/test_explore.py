"""The explore page, in a headless Chromium: what hands do to it, and its values beside torch's."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import convnexts
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from convnexts import TINY_CONVNEXT, renamed
from helpers import TINY, write_checkpoint

from dinov3_lite import DINOv3ConvNeXt, DINOv3ViT, ImageProcessor
from dinov3_lite.__main__ import main
from dinov3_lite.explore import Quantised, blocks_that_fit, check_size, explore, grid_of, page_bytes

Image = pytest.importorskip("PIL.Image")

EVIL = '<img src=x onerror="document.title=1">{{data}}.png'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
)
SIZE = 64  # of the longer side: 8 patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, two photos of which one has a name that is markup, and the page."""
    folder = tmp_path_factory.mktemp("explore")
    write_checkpoint(folder / "checkpoint", TINY)
    rng = np.random.default_rng(0)
    for name, size in (("first.png", (60, 80)), (EVIL, (90, 70))):
        blocky = rng.integers(0, 256, (size[0] // 10, size[1] // 10, 3), np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(blocky).save(folder / name)
    photos = [str(folder / "first.png"), str(folder / EVIL)]
    command = ["explore", *photos, "--model", str(folder / "checkpoint"), "--size", str(SIZE)]
    assert main([*command, "--output", str(folder / "page.html")]) == 0
    return folder


@pytest.fixture(scope="module")
def truth(folder) -> list[list[torch.Tensor]]:
    """For each photo: the normed patch vectors (n, C) of each block, from the model itself."""
    model = DINOv3ViT.from_pretrained(folder / "checkpoint")
    found = []
    for name, size in (("first.png", (48, 64)), (EVIL, (64, 48))):
        x = ImageProcessor(size)(folder / name)["pixel_values"]
        with torch.no_grad():
            found.append([patches[0] for patches in model.get_intermediate_layers(x, n=[0, 1, 2])])
    return found


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, folder):
    """The page of the vision transformer, newly opened."""
    with opened(browser, folder / "page.html") as page:
        yield page


@contextlib.contextmanager
def opened(browser, file):
    """A page, newly opened; what its scripts complain of, and what they would fetch, fails the test."""
    page = browser.new_page(viewport={"width": 1100, "height": 1400})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or errors.append(request.url)
    )
    page.goto(file.as_uri())
    yield page
    page.close()
    assert not errors


def at(page, picture: int, row: int, column: int) -> tuple[float, float]:
    rows, columns = (6, 8) if picture == 0 else (8, 6)
    box = page.locator(".stack").nth(picture).bounding_box()
    return box["x"] + (column + 0.5) * box["width"] / columns, box["y"] + (row + 0.5) * box["height"] / rows


def click(page, picture: int, row: int, column: int, key: str | None = None) -> None:
    if key:
        page.keyboard.down(key)
    page.mouse.click(*at(page, picture, row, column))
    if key:
        page.keyboard.up(key)


def readout(page) -> float:
    return float(re.search(r"-?\d\.\d{4}$", page.locator("#readout").text_content())[0])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


def error(folder, name: str = "page.html") -> float:
    """What the page says that int8 costs, and half a unit of the last digit shown."""
    text = (folder / name).read_text("utf-8")
    return json.loads(re.search(r'"cosineError":([^,]+)', text)[1]) + 5e-5


def set_range(page, selector: str, value: float) -> None:
    page.locator(selector).evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', { bubbles: true })) }", value
    )


def test_a_hovered_patch_is_compared_with_every_picture(page, truth, folder):
    page.mouse.move(*at(page, 0, 2, 3))
    assert page.locator("#readout").text_content().startswith("row 2, column 3: cosine 1.0000")
    click(page, 0, 2, 3)  # pinned: the pointer now reads similarities to it
    query = truth[0][-1][2 * 8 + 3]
    for picture, row, column in ((0, 0, 0), (0, 5, 7), (1, 7, 0), (1, 3, 5)):
        page.mouse.move(*at(page, picture, row, column))
        patch = truth[picture][-1][row * (8, 6)[picture] + column]
        assert abs(readout(page) - cosine(query, patch)) <= error(folder), (picture, row, column)
    nearest = page.locator("#nearest button").all_text_contents()
    far = [
        (cosine(query, v), p, divmod(i, (8, 6)[p]))
        for p in (0, 1)
        for i, v in enumerate(truth[p][-1])
        if p or max(abs(i // 8 - 2), abs(i % 8 - 3)) >= 2
    ]
    best, picture, (row, column) = max(far)
    assert len(nearest) == 10 and nearest[0].startswith(("first.png", EVIL)[picture])
    assert abs(float(nearest[0].rsplit(" ", 1)[1]) - best) <= error(folder) + 1e-3


def test_shift_adds_alt_subtracts_escape_lets_go(page, truth, folder):
    click(page, 0, 1, 1)
    click(page, 1, 4, 2, "Shift")
    click(page, 0, 5, 0, "Alt")
    unit = [F.normalize(v, dim=0) for v in (truth[0][-1][9], truth[1][-1][26], truth[0][-1][40])]
    query = unit[0] + unit[1] - unit[2]
    page.mouse.move(*at(page, 0, 3, 6))
    assert abs(readout(page) - cosine(query, truth[0][-1][30])) <= 3 * error(folder)
    page.keyboard.press("Escape")
    page.mouse.move(*at(page, 0, 3, 5))
    assert readout(page) == 1.0  # nothing is pinned: the pointer's own patch


def test_the_keyboard_does_what_the_mouse_does(page, truth, folder):
    page.locator(".stack").first.focus()
    page.keyboard.press("ArrowRight")  # from the middle, row 3 and column 4
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.locator("#readout").text_content().startswith("row 1, column 5")
    assert abs(readout(page) - cosine(truth[0][-1][3 * 8 + 5], truth[0][-1][8 + 5])) <= error(folder)


def test_a_finger_pins_adds_and_subtracts(page, truth, folder):
    page.check("input[name=click][value=add]")
    click(page, 0, 0, 0)
    click(page, 0, 5, 5)
    page.mouse.move(*at(page, 1, 0, 0))
    query = F.normalize(truth[0][-1][0], dim=0) + F.normalize(truth[0][-1][45], dim=0)
    assert abs(readout(page) - cosine(query, truth[1][-1][0])) <= 2 * error(folder)
    page.click("#clear")
    assert page.locator("#nearest button").count() == 0 or readout(page) == 1.0


def test_a_mask_is_what_is_above_the_threshold(page, truth, folder):
    click(page, 0, 2, 3)
    set_range(page, "#threshold", 0.2)
    assert page.locator("#threshold-value").text_content() == "0.20"
    with page.expect_download() as download:
        page.locator("text=download mask").nth(1).click()
    assert download.value.suggested_filename.endswith("-mask.png")
    mask = np.array(Image.open(download.value.path()).convert("RGB"))
    assert mask.shape == (90, 70, 3) and set(np.unique(mask)) <= {0, 255}
    similar = F.cosine_similarity(truth[1][-1], truth[0][-1][19][None], dim=1).view(8, 6)
    assert 0 < (similar > 0.2).sum() < 48
    for row in range(8):
        for column in range(6):
            if abs(similar[row, column] - 0.2) > error(folder):
                pixel = mask[int((row + 0.5) * 90 / 8), int((column + 0.5) * 70 / 6), 0]
                assert (pixel == 255) == (similar[row, column] > 0.2).item(), (row, column)


def test_the_heat_map_is_drawn_as_it_is_read(page):
    """Brightness rises with the value; what is shown is what is downloaded."""
    click(page, 0, 2, 3)
    with page.expect_download() as download:
        page.locator("text=download heat map").first.click()
    heat = np.array(Image.open(download.value.path()).convert("RGB")).astype(int)
    assert heat.shape == (60, 80, 3)
    assert heat[25, 35].tolist() == [252, 253, 191]  # the pinned patch: cosine 1
    page.mouse.move(*at(page, 0, 0, 0))
    assert page.locator("#low").text_content() == "0.00" and page.locator("#high").text_content() == "1.00"
    page.check("#stretch")
    assert float(page.locator("#low").text_content()) < float(page.locator("#high").text_content()) <= 1


def test_principal_components_are_torchs(page, truth):
    """Over all patches, and over those of the mask alone: whitened, times two, through a sigmoid, up to sign."""
    click(page, 0, 2, 3)
    set_range(page, "#threshold", 0.0)
    vectors = torch.cat([truth[0][-1], truth[1][-1]])
    inside = F.cosine_similarity(vectors, truth[0][-1][19][None], dim=1) > 0.0
    page.check("input[name=view][value=pca]")
    for over, chosen in (("all", torch.ones(len(vectors), dtype=torch.bool)), ("mask", inside)):
        page.check(f"input[name=over][value={over}]")
        with page.expect_download() as download:
            page.locator("text=download heat map").first.click()
        drawn = (
            np.array(Image.open(download.value.path()).convert("RGB").resize((8, 6), Image.Resampling.NEAREST)) / 255
        )
        centred = vectors - vectors[chosen].mean(0)
        _, singular, basis = torch.linalg.svd(centred[chosen], full_matrices=False)
        whitened = centred @ basis[:3].T / (singular[:3] / (chosen.sum() - 1) ** 0.5)
        for c in range(3):
            expected = torch.sigmoid(2 * whitened[:48, c]).view(6, 8).numpy()
            shown, there = drawn[..., c], chosen[:48].view(6, 8).numpy()
            off = min(abs(shown - expected)[there].max(), abs(shown - (1 - expected))[there].max())
            assert off < 0.03, (over, c, off)
        assert (drawn[~chosen[:48].view(6, 8).numpy()] == 0).all()


def test_blocks_cls_and_attention(page, truth, folder):
    model = DINOv3ViT.from_pretrained(folder / "checkpoint")
    x = ImageProcessor((48, 64))(folder / "first.png")["pixel_values"]
    set_range(page, "#block", 0)
    assert page.locator("#block-value").text_content() == "0"
    page.check("input[name=view][value=cls]")
    page.mouse.move(*at(page, 0, 4, 2))
    with torch.no_grad():
        ((_, cls),) = model.get_intermediate_layers(x, n=[0], return_class_token=True)
    assert abs(readout(page) - cosine(cls[0], truth[0][0][34])) <= 2 * error(folder)
    page.check("input[name=view][value=attention]")
    maps = model.attention_maps(x, 0)[0]
    for head, expected in (("-1", maps.mean(0)), ("1", maps[1])):
        page.select_option("#head", head)
        page.mouse.move(*at(page, 0, 4, 3))
        page.mouse.move(*at(page, 0, 4, 2))
        assert abs(readout(page) - expected[4, 2].item()) <= maps.max().item() / 255 + 5e-5


def test_what_is_pinned_is_marked_under_the_pointer_too(page):
    click(page, 0, 2, 3)
    click(page, 0, 4, 1, "Alt")
    read = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    pixels = np.array(page.locator(".marks").first.evaluate(read)).reshape(6 * 16, 8 * 16, 4)
    assert pixels[2 * 16 + 2, 3 * 16 + 2].tolist() == [0x35, 0xD0, 0x7F, 255]
    assert pixels[4 * 16 + 2, 1 * 16 + 2].tolist() == [0xFF, 0x4D, 0x4D, 255]
    assert pixels[2 * 16 + 4, 3 * 16 + 8].tolist() == [0, 0, 0, 255]  # a dark line beside it, on any colour of the map


def test_pictures_of_one_row_have_one_height_and_only_what_the_view_has_is_shown(page):
    boxes = [page.locator(".stack").nth(p).bounding_box() for p in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and abs(boxes[0]["height"] - boxes[1]["height"]) < 1
    for view, shown in (("similarity", "nearest"), ("attention", "head"), ("pca", "over")):
        page.check(f"input[name=view][value={view}]")
        fields = ("nearest", "head", "over")
        assert [name for name in fields if page.locator(f"#{name}-field").is_visible()] == [shown]
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_stages_of_a_convnext(browser, folder):
    weights = renamed(convnexts.trained_like(TINY_CONVNEXT), convnexts.TRANSFORMERS)
    write_checkpoint(folder / "convnext", TINY_CONVNEXT, weights)
    photos = [str(folder / "first.png"), str(folder / EVIL)]
    command = ["explore", *photos, "--model", str(folder / "convnext"), "--size", str(2 * SIZE)]
    assert main([*command, "--output", str(folder / "convnext.html")]) == 0
    model = DINOv3ConvNeXt.from_pretrained(folder / "convnext", patch_size=16)
    with torch.no_grad():
        stages = [
            model.get_intermediate_layers(
                ImageProcessor(size)(folder / name)["pixel_values"], n=4, return_class_token=True
            )
            for name, size in (("first.png", (96, 128)), (EVIL, (128, 96)))
        ]
    with opened(browser, folder / "convnext.html") as page:
        footer = page.locator("#footer").text_content()
        assert "convnext" in footer and "stages 0, 1, 2, 3" in footer and model.weights_id in footer
        assert not page.locator("input[name=view][value=attention]").is_visible()
        for block in range(4):
            set_range(page, "#block", block)
            page.check("input[name=view][value=similarity]")
            click(page, 0, 2, 3)
            query = stages[0][block][0][0][2 * 8 + 3]
            for picture, row, column in ((0, 0, 0), (0, 5, 7), (1, 7, 0), (1, 3, 5)):
                page.mouse.move(*at(page, picture, row, column))
                patch = stages[picture][block][0][0][row * (8, 6)[picture] + column]
                told = abs(readout(page) - cosine(query, patch)) <= error(folder, "convnext.html")
                assert told, (block, picture, row, column)
            page.keyboard.press("Escape")
            page.check("input[name=view][value=cls]")
            page.mouse.move(*at(page, 1, 4, 2))
            expected = cosine(stages[1][block][1][0], stages[1][block][0][0][4 * 6 + 2])
            assert abs(readout(page) - expected) <= 2 * error(folder, "convnext.html")


def test_the_footer_tells_what_was_run_and_what_int8_costs(page, folder):
    model = DINOv3ViT.from_pretrained(folder / "checkpoint")
    text = page.locator("#footer").text_content()
    for part in (model.weights_id, "blocks 0, 1, 2", "after the final norm", "48 x 64 px", "64 x 48 px", EVIL):
        assert part in text
    assert "off by at most" in text and page.locator(".banner").count() == 0
    assert page.title().startswith("first.png") and page.locator("main img").count() == 2


def test_markup_in_a_name_stays_text(folder):
    class Elements(HTMLParser):
        found: list[tuple[str, dict]] = []  # noqa: RUF012

        def handle_starttag(self, tag, attributes):
            self.found.append((tag, dict(attributes)))

    parser = Elements()
    text = (folder / "page.html").read_text("utf-8")
    parser.feed(text)
    tags = [tag for tag, _ in parser.found]
    assert tags.count("script") == 3 and "img" not in tags
    assert not any(name.startswith("on") or name == "src" for _, attributes in parser.found for name in attributes)
    (policy,) = [a["content"] for _, a in parser.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert not re.search(r"https?://|@import|url\(", text)
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    assert [p["name"] for p in data["pictures"]] == ["first.png", EVIL]


def test_int8_and_its_error():
    vectors = torch.randn(300, 64) * torch.logspace(-1, 1, 64)
    quantised = Quantised.of(vectors)
    back = quantised.scales[:, None] * quantised.channels * quantised.values
    assert quantised.values.abs().max() == 127
    exact, kept = F.normalize(vectors.double(), dim=1), F.normalize(back.double(), dim=1)
    off = (exact @ exact.T - kept @ kept.T).abs().max().item()
    assert quantised.cosine_error(vectors) == pytest.approx(off, rel=1e-5) and off < 0.01


def test_a_vit_s_at_768_px_is_within_two_megabytes():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    pixels = np.array(smooth)
    model = DINOv3ViT.from_name("vits16", num_hidden_layers=1).eval()
    grid = grid_of(pixels, (768, 768), 16)
    assert grid == (48, 48)
    page = explore([("photo.jpg", pixels)], model, ImageProcessor(), [grid], blocks_that_fit([grid], model))
    assert len(page) < 2e6
    assert len(page) < page_bytes([grid], model, [0])
    photo = re.search(r"data:image/jpeg;base64,([\w+/=]+)", page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(photo))).size == (1024, 768)


def test_blocks_are_as_many_as_fit():
    model = DINOv3ViT.from_name("vits16")
    assert blocks_that_fit([(14, 14)], model) == list(range(12))
    assert blocks_that_fit([(48, 48)], model) == [11]
    assert blocks_that_fit([(32, 32)], model) == [3, 7, 11]
    assert grid_of(np.zeros((300, 600, 3), np.uint8), 512, 16) == (16, 32)


def test_what_a_browser_would_not_open_is_said_before(folder, capsys):
    model = DINOv3ViT.from_name("vits16")
    with pytest.raises(ValueError, match=r"the page would have about \d{3} MB, for 60 pictures and 12 blocks"):
        check_size([(48, 48)] * 60, model, range(12))
    with pytest.raises(ValueError, match="size is 100: expected multiples of 16, the pixels of a patch"):
        grid_of(np.zeros((30, 60, 3), np.uint8), 100, 16)
    command = ["explore", str(folder / "first.png"), "--model", str(folder / "checkpoint"), "--output"]
    for extra, message in (
        ([str(folder / "first.png")], "first.png: is one of the inputs"),
        ([str(folder / "checkpoint" / "model.safetensors")], "model.safetensors: is one of the model's files"),
        ([str(folder / "no" / "page.html")], "there is no folder"),
        ([str(folder / "p.html"), "--blocks", "1,9"], "--blocks 1,9: expected indices from 0 to 2"),
        ([str(folder / "p.html"), "--blocks", "x"], "--blocks x: expected indices from 0 to 2"),
    ):
        assert main([*command, *extra]) == 1 and message in capsys.readouterr().err
    assert not (folder / "p.html").exists()


def test_made_weights_are_called_so():
    model = DINOv3ViT(replace(TINY, num_hidden_layers=1)).eval()
    model.weights_id = "transformers 01234567 (made, not trained)"
    page = explore([("p", np.zeros((16, 16, 3), np.uint8))], model, ImageProcessor(), [(2, 2)], [0])
    assert "The weights are made, not trained" in page
