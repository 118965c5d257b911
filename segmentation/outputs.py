"""What a network gives its loss in training, where that is more than logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


# A tuple, so that whatever looks for tensors in a network's output (DDP, DeepSpeed) finds them.
class Outputs(NamedTuple):
    """Logits with what is learned beside them; in evaluation every network gives logits alone."""

    logits: Tensor
    """(B, K, H, W)."""
    auxiliary: tuple[Tensor, ...] = ()
    """Logits (B, K, H, W) of further levels of the decoder, finest first (deep supervision)."""
    presence: Tensor | None = None
    """(B, K), a logit for whether the class occurs in the image (classification-guided module)."""

    def float(self) -> Outputs:
        """Return the same in single precision, like Tensor.float."""
        presence = None if self.presence is None else self.presence.float()
        return Outputs(self.logits.float(), tuple(logits.float() for logits in self.auxiliary), presence)

    def cropped(self, size: Sequence[int]) -> Outputs:
        """Return the same without what lies beyond this size, such as (H, W)."""
        auxiliary = tuple(cropped(logits, size) for logits in self.auxiliary)
        return Outputs(cropped(self.logits, size), auxiliary, self.presence)


def cropped(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits (B, K, ...) without what lies beyond this size of their last sides."""
    return logits[(slice(None), slice(None), *(slice(side) for side in size))]
