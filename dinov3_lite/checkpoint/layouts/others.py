"""Files of other models, by names that only they have: what an error says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first that fits; names may have anything before them that ends with a dot.
OTHERS = (
    (r"lora_[AB]\.", "a LoRA adapter: merge it into its model first and save that"),
    (r"(vision_model|text_model)\.", "a CLIP or SigLIP model, not a DINOv3 vision transformer"),
    (r"blocks\.\d+\.\d+\.", "a model whose blocks are saved in chunks (blocks.0.0.): save it with block_chunks=0"),
)
POSITIONS = r"(pos_embed|embeddings\.position_embeddings)$"
SWIN = r"layers\.\d+\.blocks\.\d+\."


def what_else(names: Iterable[str]) -> str:
    """What model has these tensors, if it is a known one of others; else nothing."""
    names = list(names)

    def has(pattern: str) -> bool:
        return any(re.search(rf"(?<![^.]){pattern}", name) for name in names)

    for pattern, what in OTHERS:
        if has(pattern):
            return what
    if has(SWIN):
        return "a Swin transformer, not a DINOv3 vision transformer"
    if has(POSITIONS):  # DINOv3 has rotary positions and so none of these
        if has(r"(register_tokens|embeddings\.register_tokens|ls1\.gamma|layer_scale1\.lambda1)"):
            return "a DINOv2 model (it has learned positions), not DINOv3"
        return "a vision transformer with learned positions (ViT, DINO, MAE or DINOv2), not DINOv3"
    return ""
