"""Compare a checkpoint's features of one photograph with the numbers that have been published for the released weights.

    python tools/published_outputs.py CHECKPOINT PHOTO

PHOTO is the picture of two cats that transformers' converters use: 000000039769.jpg of COCO's val2017, 640 x 480, as it
is at http://images.cocodataset.org/val2017/000000039769.jpg. Prints the first five numbers of the CLS token and of the
first patch token beside the published ones, and exits with 1 where they differ by more than 1e-3: then the weights or
the picture are others, or something is wrong here.

The numbers are those that transformers' converters assert (convert_dinov3_vit_to_hf.py and
convert_dinov3_convnext_to_hf.py under src/transformers/models): the picture squeezed to 224 x 224, ImageNet's
statistics for all weights, the satellite ones included, float32. They hold for RoPE periods as Meta's files have them,
rounded to bfloat16; with computed ones, which other files imply, the numbers of a ViT-S move by up to 4e-4.
"""

from __future__ import annotations

import sys

import torch

from dinov3_lite import DINOv3Config, ImageProcessor, load
from dinov3_lite.checkpoint.layouts.meta import variant_ignoring_biases

TOLERANCE = 1e-3
# By weights: the first five numbers of the normed CLS token, and of the first normed patch token.
PUBLISHED = """
vits16           0.463561 -0.415609 0.408236 -0.126613 -0.286636 | -0.038754 -0.250895 -0.016392 -0.455473 0.571582
vits16plus       -0.471349 -1.365778 -0.317983 0.377219 -0.769085 | 0.144551 -0.388117 -0.393433 -0.157695 -0.60038
vitb16           1.034643 -0.180609 -0.341018 -0.066376 -0.011383 | -0.082523 -0.456272 -0.728029 -0.43068 -0.15288
vitl16           0.484527 -0.582214 0.480636 0.59204 0.945166 | -0.211367 -0.490863 -0.257131 0.101763 0.154511
vith16plus       -0.064575 -0.148866 -0.621524 0.634878 0.152695 | -0.093817 0.287407 -0.050036 0.428043 0.094561
vit7b16          0.275439 -0.261353 0.067772 0.049936 -0.158747 | 0.044442 -0.052542 0.070777 -0.065111 -0.026546
vitl16-satellite -0.33235 0.34052 -0.22087 0.21434 0.09003 | 0.18488 0.30309 -0.20689 0.12848 0.06207
vit7b16-satellite -0.19779 0.11819 -0.00581 -0.21055 -0.03971 | -0.12423 0.07879 -0.10057 0.02835 -0.11727
convnext-tiny    -6.372119 1.300791 2.074303 -0.079975 0.607205 | 0.49053 -3.713466 1.848513 -1.040319 -1.090818
convnext-small   -0.903914 1.412183 0.287465 0.175296 -2.39794 | -1.081114 0.637362 3.748765 0.170179 1.445153
convnext-base    0.155366 -0.378771 -0.735157 -2.818718 0.015095 | 3.039118 0.778155 -1.961322 -1.607147 -2.411941
convnext-large   -2.219094 -0.594451 -2.300294 -0.957415 -0.520473 | -1.477349 -0.217038 -3.128137 0.418962 0.334949
"""


def published(variant: str = "") -> dict[str, list[float]]:
    """The ten numbers of all weights, or of those of a variant, by the weights' name."""
    rows = [line.replace("|", "").split() for line in PUBLISHED.strip().splitlines()]
    of_variant = [row for row in rows if variant in ("", row[0].removesuffix("-satellite"))]
    return {name: list(map(float, numbers)) for name, *numbers in of_variant}


def difference(a: list[float], b: list[float]) -> float:
    """The largest of ten."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@torch.inference_mode()
def main(checkpoint: str, photo: str) -> int:
    """Print the comparison and return the exit status."""
    model = load(checkpoint, dtype=torch.float32)
    output = model(**ImageProcessor(size=224)(photo))
    found = torch.cat((output.cls_token[0, :5], output.patch_tokens[0, 0, :5])).tolist()
    is_vit = isinstance(model.config, DINOv3Config)  # timm's copies leave out biases, which are zero
    name = variant_ignoring_biases(model.config) if is_vit else model.config.name
    expected = published(name)
    print(f"{checkpoint}: {name}, weights {model.weights_id}")
    if not expected:
        print(f"nothing has been published for {name}, only for {', '.join(published())}")
        return 1
    for row, numbers in {"here": found, **expected}.items():
        print(f"{row:<17}" + " |".join("".join(f" {x:9.5f}" for x in five) for five in (numbers[:5], numbers[5:])))
    nearest = min(expected, key=lambda row: difference(found, expected[row]))
    error = difference(found, expected[nearest])
    verdict = "the same as" if error <= TOLERANCE else "others than"
    print(f"{verdict} {nearest}: the largest difference is {error:.1e}, {TOLERANCE:.0e} is allowed")
    return 0 if error <= TOLERANCE else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
