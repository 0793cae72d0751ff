"""Files of other models: one sentence that says what they are."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import TINY, write_checkpoint

from convert import convert
from dinov3_lite import DINOv3ViT
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.interfaces import DINOv3ViTBackbone

PATCHES = {"patch_embed.proj.weight": (64, 3, 16, 16), "cls_token": (1, 1, 64)}
PLAIN = {**PATCHES, "pos_embed": (1, 197, 64), "blocks.0.norm1.weight": (64,), "blocks.0.attn.qkv.weight": (192, 64)}
OTHERS = {
    "DINOv2": ({**PLAIN, "blocks.0.ls1.gamma": (64,), "register_tokens": (1, 4, 64)}, "a DINOv2 model"),
    "DINOv2 of transformers": (
        {"embeddings.cls_token": (1, 1, 64), "embeddings.position_embeddings": (1, 257, 64),
         "encoder.layer.0.layer_scale1.lambda1": (64,)},
        "a DINOv2 model",
    ),
    "plain": (PLAIN, "a vision transformer with learned positions"),
    "chunks": ({**PATCHES, "blocks.0.0.norm1.weight": (64,)}, "a model whose blocks are saved in chunks"),
    "CLIP": ({"vision_model.encoder.layers.0.layer_norm1.weight": (64,), "text_model.final.weight": (9,)}, "a CLIP"),
    "Swin": ({"patch_embed.proj.weight": (96, 3, 4, 4), "layers.0.blocks.0.norm1.weight": (96,)}, "a Swin"),
    "LoRA": ({"base_model.model.layer.0.attention.q_proj.lora_A.weight": (8, 64)}, "a LoRA adapter: merge it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
def test_what_it_is(kind, wrap, tmp_path):
    shapes, sentence = OTHERS[kind]
    content = {name: torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in content.items()}} if wrap else content, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path / "x.pth")
    assert str(error.value).startswith(f"{tmp_path / 'x.pth'}: is {sentence}")


def test_an_adapter_beside_its_model(tmp_path):
    path = convert(write_checkpoint(tmp_path / "source", TINY), tmp_path / "x.pth", to="meta")
    torch.save(torch.load(path) | {"blocks.0.attn.qkv.lora_A.weight": torch.zeros(8, 32)}, path)
    with pytest.raises(ValueError, match=r"x.pth: is a LoRA adapter: merge it into its model first"):
        DINOv3ViT.from_pretrained(path)


def test_messages_are_short_whatever_the_names(tmp_path):
    torch.save({"n" * 100_000 + str(i): torch.zeros(1) for i in range(9)}, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path / "x.pth")
    assert len(str(error.value)) < 1000
    for field in ("hidden_act", "model_type", "patch_size", "out_features"):
        folder = write_checkpoint(tmp_path / field, TINY)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(json.dumps({**json.loads(text), field: "x" * 100_000}))
        with pytest.raises(ValueError) as error:
            DINOv3ViTBackbone.from_pretrained(folder)
        assert len(str(error.value)) < 1000 and field in str(error.value)


def test_a_backbone_takes_its_stages_from_the_config(tmp_path):
    folder = write_checkpoint(tmp_path / "source", TINY)
    content = json.loads((folder / "config.json").read_text())
    said = {"out_features": ["stage1", "stage3"], "out_indices": [1, 3], "apply_layernorm": False,
            "reshape_hidden_states": False, "return_class_token": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**content, **said}))
    backbone = DINOv3ViTBackbone.from_pretrained(folder)
    assert {name: getattr(backbone, name) for name in said} == said
    backbone = DINOv3ViTBackbone.from_pretrained(folder, out_indices=[2], apply_layernorm=True)
    assert (backbone.out_features, backbone.apply_layernorm, backbone.return_class_token) == (["stage2"], True, True)
    (folder / "config.json").write_text(json.dumps({**content, "apply_layernorm": "no"}))
    with pytest.raises(ValueError, match=r"config.json: apply_layernorm is 'no': expected true or false"):
        DINOv3ViTBackbone.from_pretrained(folder)
