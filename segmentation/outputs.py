"""What a network gives its loss in training, where that is more than logits."""

from __future__ import annotations

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

    def cropped(self, height: int, width: int) -> Outputs:
        """Return the same without what lies right of and below this size."""
        auxiliary = tuple(logits[..., :height, :width] for logits in self.auxiliary)
        return Outputs(self.logits[..., :height, :width], auxiliary, self.presence)
