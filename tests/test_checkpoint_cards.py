"""What a layout says of weights beside them, and that a reader takes it as it was meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import PREPROCESSING, TINY, TINY_GATED
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_lite.checkpoint.layouts import LAYOUTS
from dinov3_lite.checkpoint.layouts.table import Beside, Card
from dinov3_lite.config import VARIANTS

NUMBERS = st.floats(0.01, 1)
SIZES = st.fixed_dictionaries({"height": st.integers(1, 900), "width": st.integers(1, 900)})
TRIPLES = st.lists(NUMBERS, min_size=3, max_size=3)
WORDS = st.text(min_size=1, max_size=9)
CONFIGS = st.sampled_from([TINY, TINY_GATED, *VARIANTS.values()]).flatmap(
    lambda config: st.builds(
        lambda eps, theta: replace(config, layer_norm_eps=eps, rope_theta=theta), NUMBERS, st.floats(2, 1e4)
    )
)
ANYTHING = {
    "config": CONFIGS,
    "preprocessing": st.dictionaries(WORDS, st.one_of(WORDS, NUMBERS, st.none(), TRIPLES, SIZES)),
    "license": WORDS,
    "note": WORDS,
    **dict.fromkeys(("source_layout", "source_digest", "digest", "rope"), WORDS),
}
# What timm's config.json says of images, in the words of a preprocessor_config.json.
TIMM_IMAGES = st.fixed_dictionaries(
    {"do_resize": st.just(True), "size": SIZES, "resample": st.just(2), "image_mean": TRIPLES, "image_std": TRIPLES}
)
HOLDS = {
    "lite": ANYTHING,
    "transformers": {name: ANYTHING[name] for name in ("config", "preprocessing", "license", "note")},
    "meta": {"license": WORDS},
    "timm": {"license": WORDS},
}


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_card_is_read_as_it_was_written(name, data):
    card = Card(**{field: data.draw(strategy) for field, strategy in HOLDS[name].items()})
    layout = LAYOUTS[name]
    beside = layout.write_card(card)
    assert layout.read_card(beside) == card
    assert set(beside.files) <= set(layout.side_files)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(config=CONFIGS, images=TIMM_IMAGES)
def test_timm_says_images_and_the_arguments_of_a_model(config, images):
    written = LAYOUTS["timm"].write_card(Card(config=config, preprocessing=images))
    said = replace(config, layer_norm_eps=1e-5) if "model_args" in written.files["config.json"] else None
    assert LAYOUTS["timm"].read_card(written) == Card(config=said, preprocessing=images)
    named = "architecture" in written.files["config.json"]
    assert named == (config.query_bias == config.value_bias)  # timm has one switch for both


@settings(max_examples=200, deadline=None, derandomize=True)
@given(heads=st.integers(1, 12), quarter=st.integers(1, 40), width=st.integers(1, 5000), gated=st.booleans())
def test_widths_come_back_from_timms_ratio(heads, quarter, width, gated):
    gate = {"use_gated_mlp": True, "hidden_act": "silu"} if gated else {}
    sizes = {"hidden_size": 4 * quarter * heads, "num_attention_heads": heads, "intermediate_size": width}
    config = replace(TINY, **sizes, **gate)
    assert LAYOUTS["timm"].read_card(LAYOUTS["timm"].write_card(Card(config=config))).config == config


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_layout_can_not_say_it_leaves_away(name):
    everything = Card(TINY, PREPROCESSING, "a licence", "a note", "meta", "12", "34", "stored")
    read = LAYOUTS[name].read_card(LAYOUTS[name].write_card(everything))
    for field, nothing in Card._field_defaults.items():
        if field not in HOLDS[name] and not (name == "timm" and field in ("config", "preprocessing")):
            assert getattr(read, field) == nothing, field


@pytest.mark.parametrize("name", ["transformers", "meta", "timm"])
def test_transformers_files_are_read_beside_any_weights(name):
    beside = Beside(files={"config.json": TINY.to_dict(), "preprocessor_config.json": PREPROCESSING}, license="L")
    assert LAYOUTS[name].read_card(beside) == Card(TINY, PREPROCESSING, "L")
    beside = Beside(files={"config.json": {"model_type": "dinov2"}}, weights=Path("folder/x.pth"))
    if name == "transformers":
        with pytest.raises(ValueError, match=r"folder.config.json: model_type is 'dinov2'"):
            LAYOUTS[name].read_card(beside)
    else:  # which need none: what lies there is another model's
        assert LAYOUTS[name].read_card(beside) == Card()


@pytest.mark.parametrize("name", ["transformers", "meta", "timm"])
def test_the_preprocessing_of_speech_is_not_that_of_images(name):
    speech = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True, "sampling_rate": 16000}
    beside = Beside(files={"config.json": TINY.to_dict(), "preprocessor_config.json": speech})
    assert LAYOUTS[name].read_card(beside).preprocessing is None


def test_timm_is_told_only_what_its_readers_do():
    def told(**changes):
        card = Card(TINY, {**PREPROCESSING, **changes})
        return LAYOUTS["timm"].write_card(card).files["config.json"].get("pretrained_cfg")

    assert told(size={"height": 96, "width": 160}, image_std=[1, 2, 3]) == {
        "input_size": [3, 96, 160],
        "mean": [0.485, 0.456, 0.406],
        "std": [1, 2, 3],
        "interpolation": "bilinear",
    }
    assert told(size=64)["input_size"] == [3, 64, 64]
    assert told(do_normalize=False)["mean"] == [0.0] * 3 and told(do_normalize=False)["std"] == [1.0] * 3
    for change in (
        {"resample": 3},
        {"do_resize": False},
        {"do_center_crop": True},
        {"do_pad": True},
        {"size": {"shortest_edge": 9}},
        {"size": -4},
        {"image_mean": 0.5},
        {"image_std": [1.0, 0.0, 1.0]},
        {"image_std": [1.0, float("nan"), 1.0]},
    ):
        assert told(**change) == {}, change  # without the key, timm takes the whole file for it
