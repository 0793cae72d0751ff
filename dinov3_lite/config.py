"""The configurations: what transformers' `config.json` says, and the released ViTs and ConvNeXts by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

MODEL_TYPE = "dinov3_vit"
CONVNEXT_TYPE = "dinov3_convnext"
ACTIVATIONS = ("gelu", "silu")

# Parameters that enter the residual stream directly: in released models that stream leaves float16's range, so they
# stay in float32 where the rest is in float16.
FLOAT32_UNDER_HALF = ("cls_token", "register_tokens", "mask_token")


@dataclass(frozen=True)
class DINOv3Config:
    """Architecture of one DINOv3 ViT. Field names and defaults are those of transformers' `dinov3_vit` config.json.

    Raises ValueError if a value has the wrong type or sign, or if two values contradict each other.
    """

    patch_size: int = 16
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    image_size: int = 224
    num_channels: int = 3
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_gated_mlp: bool = False
    num_register_tokens: int = 0
    pos_embed_shift: float | None = None
    pos_embed_jitter: float | None = None
    pos_embed_rescale: float | None = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, str(field.type), getattr(self, field.name)))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} gives head dim "
                f"{self.head_dim}: 2D RoPE needs a multiple of 4"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act[:80]!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.attention_dropout:
            raise ValueError(f"attention_dropout is {self.attention_dropout}: DINOv3 has none, only 0.0 is supported")
        if self.drop_path_rate >= 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}: expected a probability below 1")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_prefix_tokens(self) -> int:
        """1 + num_register_tokens: CLS and registers, which stand before the patch tokens and get no RoPE."""
        return 1 + self.num_register_tokens

    @property
    def name(self) -> str:
        """The released variant whose tensors have these sizes (`vitb16`), else the sizes (`vit-c96-d2-h4`)."""
        for name, variant in VARIANTS.items():
            if all(getattr(self, key) == getattr(variant, key) for key in _ARCHITECTURE):
                return name
        return f"vit-c{self.hidden_size}-d{self.num_hidden_layers}-h{self.num_attention_heads}"

    @classmethod
    def from_name(cls, name: str) -> DINOv3Config:
        """A released variant by its short name (`vitb16`) or by a hub id (`facebook/dinov3-vitb16-pretrain-lvd1689m`,
        `robbyant/lingbot-vision-vit-base`).

        Raises ValueError, with the names that there are, for any other name.
        """
        repository = name.rsplit("/", 1)[-1]
        parts = repository.split("-")
        short = parts[1] if parts[0] == "dinov3" and len(parts) > 1 else OTHER_SOURCES.get(repository, name)
        if short.startswith("convnext"):
            raise ValueError(f"{name!r} is a ConvNeXt: use DINOv3ConvNeXtConfig, or DINOv3ConvNeXt for the model")
        if short not in VARIANTS:
            raise ValueError(
                f"unknown DINOv3 variant {name[:100]!r}: expected one of {', '.join(VARIANTS)}, or their hub id"
            )
        return VARIANTS[short]

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> DINOv3Config:
        """The config in a parsed config.json. Missing keys take transformers' defaults, keys of other purposes are
        ignored.

        Raises ValueError if `model_type` names another architecture or a value is out of range.
        """
        model_type = d.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            hint = ": DINOv3ConvNeXtConfig reads it" if model_type == CONVNEXT_TYPE else ""
            raise ValueError(
                f"model_type is {repr(model_type)[:100]}: expected {MODEL_TYPE!r}, a DINOv3 vision transformer{hint}"
            )
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in d.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers and `from_dict` read back as this config."""
        return {"model_type": MODEL_TYPE, "architectures": ["DINOv3ViTModel"], **asdict(self)}


@dataclass(frozen=True)
class DINOv3ConvNeXtConfig:
    """Architecture of one DINOv3 ConvNeXt. Field names and defaults are those of transformers' `dinov3_convnext`
    config.json, hidden_sizes and depths one number for each of the four stages.

    Raises ValueError if a value has the wrong type or sign, or if two values contradict each other.
    """

    num_channels: int = 3
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float = 1e-6
    drop_path_rate: float = 0.0
    image_size: int = 224

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            valid = _checked_stages(name, value) if name in _BY_STAGE else _checked(name, str(field.type), value)
            object.__setattr__(self, name, valid)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.drop_path_rate >= 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}: expected a probability below 1")

    @property
    def name(self) -> str:
        """The released variant whose tensors have these sizes (`convnext-tiny`), else the sizes
        (`convnext-c8-16-24-32-d1-1-2-1`).
        """
        for name, variant in CONVNEXTS.items():
            if all(getattr(self, key) == getattr(variant, key) for key in (*_BY_STAGE, "num_channels", "hidden_act")):
                return name
        widths, depths = ("-".join(map(str, sizes)) for sizes in (self.hidden_sizes, self.depths))
        return f"convnext-c{widths}-d{depths}"

    @classmethod
    def from_name(cls, name: str) -> DINOv3ConvNeXtConfig:
        """A released variant by its short name (`convnext-tiny`) or by a hub id
        (`facebook/dinov3-convnext-tiny-pretrain-lvd1689m`, `facebook/EUPE-ConvNeXt-T`).

        Raises ValueError, with the names that there are, for any other name.
        """
        repository = name.rsplit("/", 1)[-1]
        parts = repository.split("-")
        short = "-".join(parts[1:3]) if parts[0] == "dinov3" else OTHER_SOURCES.get(repository, name)
        if short not in CONVNEXTS:
            if short in VARIANTS or any(part in VARIANTS for part in parts):
                raise ValueError(f"{name!r} is a vision transformer: use DINOv3Config, or DINOv3ViT for the model")
            raise ValueError(
                f"unknown DINOv3 ConvNeXt {name!r}: expected one of {', '.join(CONVNEXTS)}, or their hub id"
            )
        return CONVNEXTS[short]

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> DINOv3ConvNeXtConfig:
        """The config in a parsed config.json. Missing keys take transformers' defaults, keys of other purposes are
        ignored.

        Raises ValueError if `model_type` names another architecture or a value is out of range.
        """
        model_type = d.get("model_type", CONVNEXT_TYPE)
        if model_type != CONVNEXT_TYPE:
            hint = ": DINOv3Config reads it" if model_type == MODEL_TYPE else ""
            raise ValueError(f"model_type is {model_type!r}: expected {CONVNEXT_TYPE!r}, a DINOv3 ConvNeXt{hint}")
        known = {field.name for field in fields(cls)}
        absent = {key for key in _BY_STAGE if d.get(key) is None}  # transformers writes null for its defaults
        return cls(**{key: value for key, value in d.items() if key in known - absent})

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers and `from_dict` read back as this config."""
        stages = [f"stage{i}" for i in range(1, len(self.depths) + 1)]
        return {
            "model_type": CONVNEXT_TYPE,
            "architectures": ["DINOv3ConvNextModel"],
            **asdict(self),
            **{key: list(getattr(self, key)) for key in _BY_STAGE},
            "out_features": stages[-1:],
            "out_indices": [len(stages)],
            "stage_names": ["stem", *stages],
        }


def config_from_name(name: str) -> DINOv3Config | DINOv3ConvNeXtConfig:
    """A released variant of either architecture, by its short name or by a hub id.

    Raises ValueError, with the names that there are, for any other name.
    """
    known = {**dict.fromkeys(VARIANTS, DINOv3Config), **dict.fromkeys(CONVNEXTS, DINOv3ConvNeXtConfig)}
    if name in known or "/" in name:
        return (DINOv3ConvNeXtConfig if "convnext" in name.lower() else DINOv3Config).from_name(name)
    raise ValueError(f"unknown DINOv3 variant {name!r}: expected one of {', '.join(known)}, or their hub id")


def config_from_dict(d: dict[str, Any]) -> DINOv3Config | DINOv3ConvNeXtConfig:
    """The config in a parsed config.json, a ViT's unless `model_type` says that it is a ConvNeXt's.

    Raises ValueError as `from_dict` of either class does.
    """
    return (DINOv3ConvNeXtConfig if d.get("model_type") == CONVNEXT_TYPE else DINOv3Config).from_dict(d)


# What decides the tensors' names and shapes: two configs that agree here are the same variant.
_ARCHITECTURE = (
    "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "use_gated_mlp", "hidden_act", "num_register_tokens",
    "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias",
)  # fmt: skip

_POSITIVE = {
    "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps",
    "rope_theta", "image_size", "num_channels", "pos_embed_jitter", "pos_embed_rescale", "hidden_sizes", "depths",
}  # fmt: skip
_KINDS: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
_BY_STAGE = ("hidden_sizes", "depths")


def _checked(name: str, kind: str, value: Any) -> Any:
    """`value` as the field's declared type, or ValueError: JSON may hold anything."""
    if value is None and kind.endswith("| None"):
        return None
    kind = kind.removesuffix(" | None")
    if (
        name in ("patch_size", "image_size")
        and isinstance(value, (list, tuple))
        and list(value[:1]) * len(value) == list(value) != []
    ):
        value = value[0]  # transformers 5.23 also writes a pair; only square ones exist
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    valid = isinstance(value, _KINDS[kind]) and isinstance(value, bool) == (kind == "bool")
    if not valid or (kind == "float" and not -1e30 < value < 1e30):
        raise ValueError(f"{name} is {repr(value)[:100]}: expected {kind}")
    if number and (value < 0 or (value == 0 and name in _POSITIVE)):
        raise ValueError(f"{name} is {value}: expected {'more than zero' if name in _POSITIVE else 'zero or more'}")
    if kind == "int" and value > (limit := 1000 if name in ("num_hidden_layers", "depths") else 2**20):
        raise ValueError(f"{name} is {value}: expected at most {limit}")
    return float(value) if kind == "float" else value


def _checked_stages(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise ValueError(f"{name} is {values!r}: expected four numbers, one for each stage")
    return tuple(_checked(name, "int", value) for value in values)


_VITS = DINOv3Config(num_register_tokens=4)
_SWIGLU: dict[str, Any] = {"use_gated_mlp": True, "hidden_act": "silu"}

# DINOv3 paper (arXiv 2508.10104), table 1 and appendix; sizes as in the released config.json files.
VARIANTS: dict[str, DINOv3Config] = {
    "vitt16": replace(_VITS, hidden_size=192, intermediate_size=768, num_attention_heads=3),
    "vits16": _VITS,
    "vits16plus": replace(_VITS, **_SWIGLU),
    "vitb16": replace(_VITS, hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    "vitl16": replace(_VITS, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24),
    "vitl16plus": replace(
        _VITS, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, **_SWIGLU
    ),
    "vith16plus": replace(
        _VITS, hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, **_SWIGLU
    ),
    "vit7b16": replace(
        _VITS,
        hidden_size=4096,
        intermediate_size=8192,
        num_attention_heads=32,
        num_hidden_layers=40,
        query_bias=False,
        value_bias=False,
        **_SWIGLU,
    ),
    "vitg16": replace(
        _VITS,
        hidden_size=1536,
        intermediate_size=4096,
        num_attention_heads=24,
        num_hidden_layers=40,
        query_bias=False,
        value_bias=False,
        **_SWIGLU,
    ),
}

# Trained weights of this architecture by others, without a gate: what their repositories are called.
# LingBot-Vision is arXiv 2607.05247 (the giant is theirs alone), EUPE arXiv 2603.22387 (so is the tiny one).
OTHER_SOURCES = {
    "lingbot-vision-vit-small": "vits16",
    "lingbot-vision-vit-base": "vitb16",
    "lingbot-vision-vit-large": "vitl16",
    "lingbot-vision-vit-giant": "vitg16",
    "EUPE-ViT-T": "vitt16",
    "EUPE-ViT-S": "vits16",
    "EUPE-ViT-B": "vitb16",
    "EUPE-ConvNeXt-T": "convnext-tiny",
    "EUPE-ConvNeXt-S": "convnext-small",
    "EUPE-ConvNeXt-B": "convnext-base",
}

# DINOv3 paper, section 7.2: the ViT-7B distilled into ConvNeXts (arXiv 2201.03545, section 3) for edge devices.
CONVNEXTS: dict[str, DINOv3ConvNeXtConfig] = {
    "convnext-tiny": DINOv3ConvNeXtConfig(),
    "convnext-small": DINOv3ConvNeXtConfig(depths=(3, 3, 27, 3)),
    "convnext-base": DINOv3ConvNeXtConfig(depths=(3, 3, 27, 3), hidden_sizes=(128, 256, 512, 1024)),
    "convnext-large": DINOv3ConvNeXtConfig(depths=(3, 3, 27, 3), hidden_sizes=(192, 384, 768, 1536)),
}
