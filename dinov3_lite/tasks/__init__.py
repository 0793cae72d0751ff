"""From features to answers: a dense head fitted, predictions made and measured; probes, matches and tracks.

    fit("dataset/TrainDataset", dinov3_lite.load("checkpoint"), "head.safetensors")

`train` is the loop alone, for any network that maps pictures to logits, such as a decoder of one's own on
`build_dinov3_encoder`. Pictures and masks need the extra `tasks`.
"""

from .evaluating import evaluate
from .fitting import fit
from .head import DenseHead, HeadSettings, Segmenter, load_head
from .loop import Recipe, train
from .predicting import predict

__all__ = [
    "DenseHead",
    "HeadSettings",
    "Recipe",
    "Segmenter",
    "evaluate",
    "fit",
    "load_head",
    "predict",
    "train",
]
