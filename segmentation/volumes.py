"""Volumes larger than what a network sees at once, and their counts.

A volume is (C, D, H, W), its mask (D, H, W). For losses, counts and evaluation it is one tall image, see
`segmentation.networks.volume`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segmentation import metrics
from segmentation.metrics import Counts
from segmentation.networks.volume import Volumes, to_image, to_volume


@torch.inference_mode()
def predict_volume(
    model: nn.Module,
    volume: Tensor,
    *,
    window: Sequence[int],
    multilabel: bool,
    overlap: float = 0.5,
    batch_size: int = 1,
) -> Tensor:
    """Return the probability of each class at each voxel, (K, D, H, W), for a normalised volume (C, D, H, W).

    Windows overlap by this share of their sides; where they do, probabilities are averaged with a weight that falls off
    towards a window's edge, as `prediction.predict_tiles` does with images.

    model: a network of volumes, also as `networks.build` returns it; left in evaluation mode.
    window: slices, height and width of what it sees at once; a side larger than the volume's is cut to that.

    Source: MONAI's sliding_window_inference.
    """
    # Late, because it takes seconds to import.
    from monai.inferers.utils import sliding_window_inference

    if volume.dim() != 4 or len(window) != 3:
        raise ValueError(
            f"volume: got shape {tuple(volume.shape)} and a window of {tuple(window)}; expected (C, D, H, W) and "
            "three sides"
        )
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: got {overlap}; expected 0 or more, and less than 1")
    network = (model.network if isinstance(model, Volumes) else model).eval()

    def probability(part: Tensor) -> Tensor:
        logits: Tensor = network(part).float()
        return logits.sigmoid() if multilabel else logits.softmax(1)

    sides = [min(side, size) for side, size in zip(window, volume.shape[1:], strict=True)]
    found = sliding_window_inference(volume[None], sides, batch_size, probability, overlap=overlap, mode="gaussian")
    assert isinstance(found, Tensor)
    return found[0]


def fullest(mask: Tensor, slices: int, *, ignore_index: int = 255) -> int:
    """Return which slice of a volume shows most besides background, by its mask as a tall image (D * H, W)."""
    shown = (mask != 0) & (mask != ignore_index)
    return int(to_volume(shown, slices).sum((-2, -1)).argmax())


def count(scores: Tensor, mask: Tensor, *, multilabel: bool, threshold: float = 0.5, ignore_index: int = 255) -> Counts:
    """Return counts (N, K, 4) of each volume, from which `metrics` makes Dice and others over its voxels.

    scores: logits (N, K, D, H, W).
    mask: (N, D, H, W) class ids, or (N, K, D, H, W) zeros and ones.
    """
    return metrics.count(
        to_image(scores), to_image(mask), multilabel=multilabel, threshold=threshold, ignore_index=ignore_index
    )
