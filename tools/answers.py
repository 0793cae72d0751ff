"""Draw the front page's pictures of what the commands give: docs/images/answers.png (`fit` and `predict`, `match`,
`track`) and docs/images/explore.png (a page of `explore` in a browser).

    python tools/answers.py PHOTO

Needs a photograph, such as the one that `make demo` puts into demo/, the extra `tasks`, playwright and a Chromium.
Weights, camouflage and frames are made; a head is fitted for a few epochs. What is drawn is what the commands write.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests" / "support"))
import camouflage  # noqa: E402

HEIGHT, GAP, CAPTION = 240, 8, 22
FRAMES = 9


def main() -> None:
    photo = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dinov3("sample", work / "checkpoint")
        explored(work, photo).quantize(160).save(IMAGES / "explore.png", optimize=True)
        panels = [*masks(work), *matches(work, photo), *tracks(work)]
    sheet(panels).quantize(160).save(IMAGES / "answers.png", optimize=True)


def dinov3(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dinov3_lite", *map(str, words)], check=True)


def explored(work: Path, photo: Path) -> Image.Image:
    """The page with a patch of the face pinned, as it is seen in a window of 1000 x 900 pixels."""
    from playwright.sync_api import sync_playwright

    page_file, screenshot = work / "page.html", work / "page.png"
    dinov3("explore", photo, "--model", work / "checkpoint", "--size", 512, "--output", page_file)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--headless", "--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1000, "height": 900})
        page.goto(page_file.as_uri())
        box = page.locator(".stack").bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.42 * box["height"])
        page.screenshot(path=screenshot)
        chromium.close()
    return Image.open(screenshot).convert("RGB")


def masks(work: Path) -> list[tuple[Image.Image, str]]:
    """A picture of made camouflage, and the prediction of a head that never saw it."""
    camouflage.write(work / "data", 160, seed=0)
    test = camouflage.write(work / "test", 4, seed=1)
    model = ("--model", work / "checkpoint")
    dinov3("fit", work / "data", *model, "--size", "96x112", "--epochs", 8, "--output", work / "head.safetensors")
    dinov3("predict", test / "Image", *model, "--head", work / "head.safetensors", "--output", work / "p", "--overlay")
    name = "made-0001.png"
    return [
        (Image.open(test / "Image" / name), "made camouflage"),
        (Image.open(work / "p" / "overlay" / name), "fit, predict --overlay"),
    ]


def matches(work: Path, photo: Path) -> list[tuple[Image.Image, str]]:
    """A photograph, and a part of it enlarged."""
    whole = Image.open(photo).convert("RGB")
    w, h = whole.size
    whole.crop((w // 8, 0, w, 7 * h // 8)).resize((w, h)).save(work / "part.png")
    whole.save(work / "whole.png")
    drawing = work / "matches.png"
    where = ("--output", work / "matches.json", "--picture", drawing)
    dinov3(
        "match", work / "whole.png", work / "part.png", "--model", work / "checkpoint", *where, "--size", 512,
        "--count", 30, "--spacing", 3,
    )  # fmt: skip
    return [(Image.open(drawing), "match")]


def tracks(work: Path) -> list[tuple[Image.Image, str]]:
    """Two textured discs that cross: the mask that was given, and the last one that was found."""
    rng = np.random.default_rng(0)
    size = (192, 256)

    def texture(colour: tuple[int, int, int]) -> np.ndarray:
        coarse = rng.normal(0, 25, (size[0] // 8, size[1] // 8, 1)).repeat(8, 0).repeat(8, 1)
        return np.clip(np.array(colour) + coarse, 0, 255).astype(np.uint8)

    ground, first, second = texture((90, 120, 90)), texture((220, 60, 60)), texture((60, 60, 220))
    y, x = np.mgrid[: size[0], : size[1]]
    (work / "frames").mkdir()
    for t in range(FRAMES):
        frame, mask = ground.copy(), np.zeros(size, np.uint8)
        for value, thing, (cy, cx) in ((1, first, (62, 50 + 18 * t)), (2, second, (136, 206 - 18 * t))):
            inside = (y - cy) ** 2 + (x - cx) ** 2 < 36**2
            frame[inside], mask[inside] = np.roll(thing, cx, axis=1)[inside], value
        Image.fromarray(frame).save(work / "frames" / f"{t}.png")
        if t == 0:
            Image.fromarray(mask).save(work / "first.png")
    dinov3(
        "track", work / "frames", "--mask", work / "first.png", "--model", work / "checkpoint", "--size", 384,
        "--output", work / "tracked",
    )  # fmt: skip
    return [
        (tinted(work, 0), "track: the mask that is given"),
        (tinted(work, FRAMES - 1), f"the mask that is found {FRAMES - 1} frames later"),
    ]


def tinted(work: Path, t: int) -> Image.Image:
    from dinov3_lite.tasks.drawing import overlay

    frame, mask = (np.array(Image.open(work / place / f"{t}.png")) for place in ("frames", "tracked"))
    return Image.fromarray(overlay(frame, mask, classes=3))


def sheet(panels: list[tuple[Image.Image, str]]) -> Image.Image:
    scaled = [(p.convert("RGB").resize((round(p.width * HEIGHT / p.height), HEIGHT)), text) for p, text in panels]
    width = sum(panel.width + GAP for panel, _ in scaled) - GAP
    drawn = Image.new("RGB", (width, HEIGHT + CAPTION), "white")
    pen, x = ImageDraw.Draw(drawn), 0
    for panel, text in scaled:
        drawn.paste(panel, (x, 0))
        pen.text((x, HEIGHT + 6), text, fill="black")
        x += panel.width + GAP
    return drawn


if __name__ == "__main__":
    main()
