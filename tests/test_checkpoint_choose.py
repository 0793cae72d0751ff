"""Which backbone of several is taken: the order of dinov3_lite/checkpoint/choose.py, and a question where it has none."""

from __future__ import annotations

import itertools

import pytest

from dinov3_lite.checkpoint.choose import choose, prefixes, without_wrappers

BLOCKS = ("blocks.", "layer.", "model.layer.")
ANCHORS = ("cls_token", "embeddings.cls_token")


def names(*before: str) -> list[str]:
    return [f"{prefix}{name}" for prefix in before for name in ("cls_token", "patch_embed.proj.weight", "blocks.0.x")]


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([""], ""),
        (["backbone."], "backbone."),
        (["", "decoder.encoder."], None),
        (["model.", "model_ema."], "model_ema."),
        (["model.", "ema.module."], "ema.module."),
        (["state_dict.", "state_dict_ema."], "state_dict_ema."),
        (["state_dict.", "ema_state_dict."], "ema_state_dict."),
        (["model.", "model_ema_state_dict."], "model_ema_state_dict."),
        (["student.backbone.", "teacher.backbone."], "teacher.backbone."),
        (
            ["gram_teacher.backbone.", "model_ema.backbone.", "student.backbone.", "teacher.backbone."],
            "model_ema.backbone.",
        ),
        (["gram_teacher.backbone.", "student.backbone."], "student.backbone."),
        (["gram_teacher.backbone."], None),
        (["model.", "semantic."], None),  # s-ema-ntic
        (["cinema.", "model."], None),
        (["rgb.", "depth."], None),
        (["model.rgb.", "model.depth.", "ema.rgb.", "ema.depth."], None),
        (["ema.", "model_ema."], None),
        (
            ["train_model.ema_model.model.backbone.", "train_model.model.backbone."],
            "train_model.ema_model.model.backbone.",
        ),
    ],
)
def test_whole_names_decide_and_two_of_a_kind_are_a_question(found, chosen):
    for order in itertools.permutations(found):
        if chosen is not None:
            assert choose(order) == chosen
            continue
        with pytest.raises(
            ValueError, match=r"holds \d backbones?, under .*: name the one that is meant with prefix="
        ) as error:
            choose(order)
        assert all(repr(prefix) in str(error.value) for prefix in found)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("rgb.", "rgb."),
        ("rgb", "rgb."),
        ("gram_teacher", "gram_teacher.backbone."),
        ("gram_teacher.backbone", "gram_teacher.backbone."),
        ("", ""),
        ("m", "m."),
        ("n", "n.ema."),
    ],
)
def test_a_prefix_names_one(wanted, chosen):
    assert choose(["", "rgb.", "depth.", "gram_teacher.backbone.", "m.", "m.x.", "n.ema.", "n.raw."], wanted) == chosen


@pytest.mark.parametrize("wanted", ["rg", "rgb.d", "backbone", "gram_teacher.back"])
def test_a_prefix_that_names_none(wanted):
    with pytest.raises(
        ValueError, match=rf"has no backbone under '{wanted}': there are 'gram_teacher.backbone.', 'rgb.'"
    ):
        choose(["rgb.", "gram_teacher.backbone."], wanted)


def test_what_a_backbone_is():
    flat = ["embeddings.cls_token", "model.layer.0.norm1.weight"]
    assert prefixes(flat, ANCHORS, BLOCKS) == [""]
    assert prefixes([f"model.{name}" for name in flat], ANCHORS, BLOCKS) == ["model."]
    assert prefixes(names("", "teacher."), ANCHORS, BLOCKS) == ["", "teacher."]
    assert prefixes([*names("encoder."), "decoder.cls_token", "my_cls_token", "neck.blocks.0.x"], ANCHORS, BLOCKS) == [
        "encoder."
    ]


def test_wrappers_are_no_part_of_a_name():
    assert (
        without_wrappers("_orig_mod.blocks.0._checkpoint_wrapped_module.attn.qkv.weight") == "blocks.0.attn.qkv.weight"
    )
    assert without_wrappers("a._fsdp_wrapped_module._orig_mod.b") == "a.b"
    assert without_wrappers("my_orig_mod.b") == "my_orig_mod.b"
