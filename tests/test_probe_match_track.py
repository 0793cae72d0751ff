"""probe, match and track: on features and sequences whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_lite.__main__ import main
from dinov3_lite.tasks import tracking
from dinov3_lite.tasks.matching import match
from dinov3_lite.tasks.probing import (
    class_folders,
    classes_of_keys,
    confused,
    confusion,
    few_shot,
    nearest,
    probe,
    split,
)
from dinov3_lite.tasks.tracking import boundary_f, j_and_f, jaccard, neighbourhood, propagate, read_frames, track
from dinov3_lite.visualize import PANEL_HEIGHT

Image = pytest.importorskip("PIL.Image")
CONFIG = replace(TINY, patch_size=8, num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG)


def save(file: Path, pixels: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


# ---- probe


def clusters(per_class: int, classes: int = 3, noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = np.repeat(np.arange(classes), per_class)
    return centres[labels] + noise * torch.randn(len(labels), 16, generator=generator), labels


def test_k_nn_votes_as_its_equation_says():
    train, labels = clusters(8, noise=2.0)
    test, _ = clusters(4, noise=2.0, seed=1)
    expected = []
    for query in test:
        cosines = F.cosine_similarity(train, query[None], dim=1)
        votes = np.zeros(3)
        for i in cosines.argsort(descending=True)[:10].tolist():
            votes[labels[i]] += np.exp(cosines[i].item() / 0.07)
        expected.append(votes.argmax())
    assert nearest(train, labels, test, 10).tolist() == expected


def test_clusters_are_told_apart():
    pytest.importorskip("sklearn")
    train, labels = clusters(40)
    test, truth = clusters(20, seed=1)
    probed = probe(train, labels, test, truth)
    assert list(probed.knn) == [10, 20, 100, 120] and probed.logistic > 0.95 and min(probed.knn.values()) > 0.95
    assert 1e-6 <= probed.C <= 1e5
    swapped = probe(train, (labels + 1) % 3, test, truth)
    assert swapped.logistic < 0.05 and max(swapped.knn.values()) < 0.05
    one_shot = probe(train[::40], labels[::40], test, truth)  # a class a picture: nothing to hold out
    assert list(one_shot.knn) == [3] and one_shot.C == 1.0 and one_shot.logistic > 0.8


def test_c_is_the_one_that_does_best_on_what_is_held_out():
    sklearn = pytest.importorskip("sklearn.linear_model")
    train, labels = clusters(10, noise=1.5)
    held, held_labels = clusters(15, noise=1.5, seed=2)
    test, truth = clusters(15, noise=1.5, seed=3)
    X, H, Y = (features.double().numpy() for features in (train, held, test))
    scores = []
    for power in np.linspace(-6, 5, 45):
        model = sklearn.LogisticRegression(C=10**power, max_iter=1000, tol=1e-12).fit(X, labels)
        scores.append((model.score(H, held_labels), -power, model.predict(Y)))
    score, power, predictions = max(scores, key=lambda entry: entry[:2])
    probed = probe(train, labels, test, truth, (held, held_labels))
    assert score > 0.6
    assert abs(np.log10(probed.C) + power) < 1e-6
    assert np.array_equal(probed.predictions, predictions)


def test_what_is_confused():
    matrix = confusion(np.array([0, 1, 1, 2, 1]), np.array([0, 1, 0, 2, 0]), 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 1]]
    assert confused(matrix, ["a", "b", "c"]) == [("a", "b", 2)]


def test_few_shots_are_drawn_by_seed():
    labelled = classes_of_keys(Path("store"), [f"{c}/{i}.jpg" for c in "abc" for i in range(6)])
    drawn = few_shot(labelled, 2, seed=0)
    assert np.bincount(labelled.labels[drawn]).tolist() == [2, 2, 2]
    assert drawn.tolist() == few_shot(labelled, 2, seed=0).tolist() != few_shot(labelled, 2, seed=1).tolist()
    with pytest.raises(ValueError, match="class a: has 6 pictures to train on: expected at least 7"):
        few_shot(labelled, 7, seed=0)
    train, apart = split(labelled, 0.3, seed=0)
    assert np.bincount(apart.labels).tolist() == [2, 2, 2] and not set(train.items) & set(apart.items)


def test_folders_that_are_no_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        class_folders(tmp_path / "nowhere")
    save(tmp_path / "one" / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="holds 1 class: expected at least two"):
        class_folders(tmp_path)
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match="two: holds no picture"):
        class_folders(tmp_path)
    with pytest.raises(ValueError, match="the key 'x.jpg' has no class"):
        classes_of_keys(tmp_path, ["a/1.jpg", "x.jpg"])


def coloured(folder: Path, per_class: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, colour in (("blue", (20, 20, 220)), ("red", (220, 20, 20))):
        for i in range(per_class):
            save(folder / name / f"{i}.png", np.clip(colour + rng.normal(0, 20, (24, 24, 3)), 0, 255).astype(np.uint8))
    return folder


def test_the_probe_command(checkpoint, tmp_path, capsys):
    pytest.importorskip("sklearn")
    data = coloured(tmp_path / "data", 8, seed=0)
    command = ["probe", str(data), "--model", str(checkpoint)]
    assert main([*command, "--shots", "3", "--seeds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["classes"] == ["blue", "red"] and result["train"] == 6 and result["test"] == 4
    assert result["accuracy"]["logistic regression"] == {"mean": 1.0, "std": 0.0}
    assert result["confusion"] == [[4, 0], [0, 4]]  # two seeds of two pictures
    # folders train and val are what they say
    coloured(tmp_path / "both" / "train", 5, seed=1)
    coloured(tmp_path / "both" / "val", 2, seed=2)
    assert main(["probe", str(tmp_path / "both"), "--model", str(checkpoint)]) == 0
    assert "2 classes, 10 to train on, 4 to test on" in capsys.readouterr().out
    coloured(tmp_path / "both" / "test", 2, seed=3)
    assert main(["probe", str(tmp_path / "both"), "--model", str(checkpoint)]) == 1
    assert "holds test and val: give the one to test on" in capsys.readouterr().err


def test_a_feature_store_is_probed_as_its_pictures_are(checkpoint, tmp_path, capsys):
    pytest.importorskip("sklearn")
    data = coloured(tmp_path / "data", 8, seed=0)
    model = ["--model", str(checkpoint)]
    store = tmp_path / "store"
    assert main(["extract", str(data), *model, "--output", str(store), "--store", "float32", "--quiet"]) == 0
    printed = {}
    for source in ([str(data), *model], [str(store)]):
        capsys.readouterr()
        assert main(["probe", *source, "--shots", "3", "--seeds", "2", "--json"]) == 0
        printed[len(source)] = json.loads(capsys.readouterr().out)
    assert printed[1] == printed[3]
    patches = tmp_path / "patches"
    assert main(["extract", str(data), *model, "--output", str(patches), "--outputs", "patch_mean", "--quiet"]) == 0
    assert main(["probe", str(patches)]) == 1
    assert "patches: holds patch_mean and no cls_token: extract that, too" in capsys.readouterr().err


# ---- match


def test_matches_are_mutual_and_found_where_they_were_put():
    first = torch.randn(8, 5, 6)
    second = torch.roll(first, (1, 2), dims=(1, 2)) * 3
    matches = match(first, second)
    assert len(matches) == 30
    assert {(m.first, m.second) for m in matches} == {
        ((y, x), ((y + 1) % 5, (x + 2) % 6)) for y in range(5) for x in range(6)
    }
    assert all(m.cosine == pytest.approx(1, abs=1e-5) for m in matches)
    # the second picture has a patch twice: only one of them is anybody's nearest
    second[:, 0, 0] = second[:, 4, 4]
    assert len(match(first, second)) == 29
    assert len(match(first, second, count=7)) == 7


def test_matches_are_spread():
    first = torch.randn(16, 12, 12)
    noisy = first + 0.1 * torch.randn_like(first)
    for spacing in (2.0, 4.5):
        matches = match(first, noisy, spacing=spacing)
        places = torch.tensor([m.first for m in matches], dtype=torch.float)
        apart = torch.cdist(places, places) + 1e9 * torch.eye(len(places))
        assert apart.min() >= spacing and len(matches) >= 5
        assert [m.cosine for m in matches] == sorted((m.cosine for m in matches), reverse=True)
    with pytest.raises(ValueError, match=r"second has shape \(4, 3, 3\)"):
        match(first, torch.randn(4, 3, 3))


def test_the_match_command(checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 96, 3), np.uint8).repeat(1, 0)
    first, second = save(tmp_path / "a.png", pixels), save(tmp_path / "b.png", pixels)
    output, drawing = tmp_path / "m.json", tmp_path / "m.png"
    command = ["match", str(first), str(second), "--model", str(checkpoint), "--size", "96", "--spacing", "0"]
    assert main([*command, "--output", str(output), "--picture", str(drawing), "--count", "500"]) == 0
    matches = json.loads(output.read_text())["matches"]
    assert len(matches) == 96 and all(m["first"] == m["second"] for m in matches)  # a picture matches itself
    assert matches[0]["first"][0] % 8 == 4 and Image.open(drawing).height == PANEL_HEIGHT
    for written, said in ((first, "inputs"), (checkpoint / "config.json", "model's files")):
        before = written.read_bytes()
        assert main([*command, "--output", str(output), "--picture", str(written)]) == 1
        assert main([*command, "--output", str(written)]) == 1 and written.read_bytes() == before
        assert capsys.readouterr().err.count(f"{written.name}: is one of the {said}") == 2


# ---- track


def sequence(count: int = 8, size: tuple[int, int] = (80, 112)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two textured discs that cross a textured ground, and their masks with the values 3 and 7."""
    rng = np.random.default_rng(0)

    def texture(colour: tuple[int, int, int]) -> np.ndarray:
        coarse = rng.normal(0, 25, (size[0] // 4, size[1] // 4, 1)).repeat(4, 0).repeat(4, 1)
        return np.clip(np.array(colour) + coarse, 0, 255).astype(np.uint8)

    ground, things = texture((90, 120, 90)), [texture((220, 60, 60)), texture((60, 60, 220))]
    y, x = np.mgrid[: size[0], : size[1]]
    frames, masks = [], []
    for t in range(count):
        frame, mask = ground.copy(), np.zeros(size, np.uint8)
        for value, thing, (cy, cx) in ((3, things[0], (26, 24 + 6 * t)), (7, things[1], (58, 90 - 6 * t))):
            inside = (y - cy) ** 2 + (x - cx) ** 2 < 15**2
            shifted = np.roll(thing, (6 * t if value == 3 else -6 * t), axis=1)
            frame[inside], mask[inside] = shifted[inside], value
        frames.append(frame)
        masks.append(mask)
    return frames, masks


def colours(frame: np.ndarray) -> torch.Tensor:
    """Features that say what colour a patch of 4 x 4 pixels has."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    return F.avg_pool2d(pixels, 4)[0] - 100


def test_objects_are_followed():
    frames, masks = sequence()
    found = list(track(frames, masks[0], colours))
    assert len(found) == len(frames) and np.array_equal(found[0], masks[0])
    assert all(set(np.unique(mask)) <= {0, 3, 7} for mask in found)
    followed, still = j_and_f(found, masks), j_and_f([masks[0]] * len(masks), masks)
    assert followed["J"] > 0.8 and followed["F"] > 0.8
    assert followed["J&F"] > still["J&F"] + 0.3


def test_a_frame_asks_the_first_and_the_seven_before_it(monkeypatch):
    frames, masks = sequence(11)
    asked, real = [], tracking.propagate

    def watched(vectors, context, near):
        asked.append([keys for keys, _ in context])
        return real(vectors, context, near)

    monkeypatch.setattr(tracking, "propagate", watched)
    list(track(frames, masks[0], colours))
    unit = [F.normalize(colours(frame), dim=0).flatten(1).T for frame in frames]
    assert len(asked) == 10
    for i, context in enumerate(asked, start=1):
        expected = [0, *range(max(1, i - 7), i)]
        assert len(context) == len(expected)
        assert all(torch.equal(keys, unit[k]) for keys, k in zip(context, expected, strict=True))


def test_an_object_that_fills_the_first_frame_is_followed():
    frames, masks = sequence(3)
    assert all((found == 3).all() for found in track(frames, np.full_like(masks[0], 3), colours))


def test_similarities_are_held_a_part_at_a_time(monkeypatch):
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest[0] = max(largest[0], out.numel() if func is torch.ops.aten.mm.default else 0)
            return out

    vectors, near = F.normalize(torch.randn(120, 8), dim=1), neighbourhood(3, 40, 12)
    context = [(vectors, torch.rand(120, 2))] * 2
    whole = propagate(vectors, context, near)
    monkeypatch.setattr(tracking, "CHUNK", 7 * 240)
    with Watch():
        parts = propagate(vectors, context, near)
    assert largest[0] == 7 * 240
    torch.testing.assert_close(parts, whole)


def test_labels_are_propagated_as_the_recipe_says():
    h, w = 3, 40
    torch.manual_seed(3)
    vectors = F.normalize(torch.randn(h * w, 8), dim=1)
    context = [(F.normalize(torch.randn(h * w, 8), dim=1), torch.rand(h * w, 2)) for _ in range(3)]
    found = propagate(vectors, context, neighbourhood(h, w, 12))
    for p in (0, 61, 119):
        candidates = [
            ((vectors[p] @ v[q]).item(), labels[q])
            for v, labels in context
            for q in range(h * w)
            if (p // w - q // w) ** 2 + (p % w - q % w) ** 2 <= 144
        ]
        top = sorted(candidates, key=lambda c: -c[0])[:5]
        weights = torch.softmax(torch.tensor([c for c, _ in top]) / 0.2, 0)
        torch.testing.assert_close(found[p], (weights[:, None] * torch.stack([label for _, label in top])).sum(0))


def test_j_and_f_of_masks_that_are_known():
    truth = np.zeros((100, 100), bool)
    truth[20:60, 20:60] = True
    assert jaccard(truth, truth) == boundary_f(truth, truth) == 1.0
    empty = np.zeros_like(truth)
    assert jaccard(empty, empty) == boundary_f(empty, empty) == 1.0
    assert jaccard(truth, empty) == boundary_f(truth, empty) == boundary_f(empty, truth) == 0.0
    shifted = np.roll(truth, 2, axis=1)
    assert jaccard(truth, shifted) == pytest.approx(38 / 42)
    assert boundary_f(truth, shifted) == 1.0  # two pixels: 0.008 of the diagonal of 141
    assert boundary_f(truth, np.roll(truth, 30, axis=1)) < 0.6
    # first and last frames don't count, and objects count alike whatever their size
    masks = [truth.astype(np.uint8)] * 4
    masks[0] = masks[0].copy()
    masks[0][80:82, 80:82] = 2
    found = [empty.astype(np.uint8), masks[1], masks[1], empty.astype(np.uint8)]
    assert j_and_f(found, masks) == {"J": 1.0, "F": 1.0, "J&F": 1.0}


def test_the_track_command(checkpoint, tmp_path, capsys):
    frames, masks = sequence(4, (64, 80))
    for i, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        save(tmp_path / "frames" / f"{i:05d}.png", frame)
        save(tmp_path / "truth" / f"{i:05d}.png", mask)
    first = Image.fromarray(masks[0], "P")
    first.putpalette([0, 0, 0] * 3 + [200, 0, 0] + [0, 0, 0] * 3 + [0, 200, 0])
    first.save(tmp_path / "first.png")
    command = ["track", str(tmp_path / "frames"), "--model", str(checkpoint), "--size", "64"]
    output = ["--mask", str(tmp_path / "first.png"), "--output", str(tmp_path / "out")]
    assert main([*command, *output, "--truth", str(tmp_path / "truth")]) == 0
    assert "J&F" in capsys.readouterr().out
    written = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in written] == [f"{i:05d}.png" for i in range(4)]
    last = Image.open(written[-1])
    assert last.mode == "P" and last.getpalette()[9:12] == [200, 0, 0] and last.size == (80, 64)
    assert np.array_equal(np.array(Image.open(written[0])), masks[0])
    (tmp_path / "out").rename(tmp_path / "same")
    for truth, jaccards in ([], None), (["--truth", str(tmp_path / "same")], 1.0):  # the second time over the first
        assert main([*command, *output, *truth, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["frames"] == [f"{i:05d}" for i in range(4)] and told["output"] == str(tmp_path / "out")
        assert (told["measures"] or {}).get("J") == jaccards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frames, mask: (frames, mask * 0), "the first mask is empty"),
        (lambda frames, mask: (frames, mask[:-1]), "frame 0 is 80 x 112 pixels and the first mask 79 x 112"),
        (
            lambda frames, mask: ([frames[0], frames[1][1:]], mask),
            "frame 1 is 79 x 112 pixels and the first frame 80 x 112",
        ),
    ],
)
def test_what_can_not_be_followed(change, message):
    frames, masks = sequence(3)
    frames, mask = change(frames, masks[0])
    with pytest.raises(ValueError, match=message):
        list(track(frames, mask, colours))


def test_a_video_that_ends_early_is_said(checkpoint, tmp_path, capsys):
    cv2 = pytest.importorskip("cv2")
    frames, masks = sequence(12, (64, 80))
    video = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 64))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    read = list(read_frames(video))
    assert [name for name, _ in read] == [f"{i:05d}" for i in range(12)]
    assert abs(read[5][1].astype(int) - frames[5]).mean() < 12  # in RGB: a wrong order would be off by 40
    cut = tmp_path / "cut.avi"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    save(tmp_path / "first.png", masks[0])
    command = ["track", str(cut), "--mask", str(tmp_path / "first.png"), "--model", str(checkpoint), "--size", "64"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "cut.avi: ends after" in err and "of the 12 frames that it announces" in err
    assert 0 < len(list((tmp_path / "out").iterdir())) < 12
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4: can't be read as a video"):
        list(read_frames(tmp_path / "text.mp4"))
    with pytest.raises(FileNotFoundError, match="no such video"):
        list(read_frames(tmp_path / "nowhere"))


# ---- the foreground's principal components


def test_the_foregrounds_components_are_the_papers_recipe():
    from dinov3_lite.visualize import foreground_pca

    generator = torch.Generator().manual_seed(0)
    maps = 0.1 * torch.randn(2, 12, 10, 10, generator=generator)
    inside = torch.zeros(2, 10, 10, dtype=torch.bool)
    inside[0, 3:7, 2:8] = inside[1, 2:5, 4:9] = True
    maps[:, 0] += 5 * inside  # what tells foreground from ground
    maps[:, 1:4] += (
        inside[:, None] * torch.randn(2, 3, 10, 10, generator=generator) * torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1)
    )
    colours = foreground_pca(maps)
    assert torch.equal(colours.sum(-1) > 0, inside)
    vectors = maps.permute(0, 2, 3, 1)[inside]
    centred = vectors - vectors.mean(0)
    _, singular, basis = torch.linalg.svd(centred, full_matrices=False)
    expected = torch.sigmoid(2 * (centred @ basis[:3].T) / (singular[:3] / (len(vectors) - 1) ** 0.5))
    for c in range(3):
        shown = colours[inside][:, c]
        assert min((shown - expected[:, c]).abs().max(), (shown - 1 + expected[:, c]).abs().max()) < 1e-4
