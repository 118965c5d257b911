"""UNet and UNet++ of segmentation-models-pytorch on any timm encoder, behind the interface that all networks have.

The encoder with its weights is ours (`timm_unet.build_encoder`): published or from a file, and never silently fresh
ones. Deep supervision of UNet++, which the library lacks, has a head on each node of the finest row that has a skip.
Source: Iakubovskii 2019, Segmentation Models Pytorch; Zhou et al. 2018, arXiv:1807.10165, section 3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from segmentation.networks.parts import EncoderNetwork, fitted
from segmentation.networks.timm_unet import DECODER_WIDTHS, build_encoder
from segmentation.outputs import Outputs

if TYPE_CHECKING:
    from segmentation.networks import Network

NORMS = {"batch": "batchnorm", "instance": "instancenorm", "none": "identity"}


def build(config: Network, in_channels: int, classes: int) -> nn.Module:
    """Return the library's UNet on the configured encoder."""
    return LibraryNetwork("Unet", config, in_channels, classes)


def build_plusplus(config: Network, in_channels: int, classes: int) -> nn.Module:
    """Return the library's UNet++ on the configured encoder."""
    return LibraryNetwork("UnetPlusPlus", config, in_channels, classes)


class LibraryNetwork(EncoderNetwork):
    """A network of the library: our encoder, its decoder and head."""

    def __init__(self, family: str, config: Network, in_channels: int, classes: int) -> None:
        encoder = build_encoder(config, in_channels)
        super().__init__(encoder, config.freeze_encoder)
        made = _made(family, config, encoder, in_channels, classes)
        made.encoder.model = encoder
        # It brings the features into the library's order, and has no weights beside the encoder's.
        self._features = (made.encoder,)
        self.decoder, self.head = made.decoder, made.segmentation_head
        self.sides: list[str] = []
        if config.deep_supervision and family == "UnetPlusPlus":
            self.sides = _sides(made.decoder)
        self.side_heads = nn.ModuleList(
            nn.Conv2d(self.decoder.blocks[name].out_channels, classes, 1) for name in self.sides
        )

    def forward(self, image: Tensor) -> Tensor | Outputs:
        """Return logits (B, K, H, W) of an image (B, C, H, W) of any size; Outputs in training, if there is more."""
        return fitted(self._logits, image, self.strides[-1])

    def _logits(self, image: Tensor) -> Tensor | Outputs:
        features = self._features[0](image)
        if not (self.training and self.sides):
            logits: Tensor = self.head(self.decoder(features))
            return logits
        found: dict[str, Tensor] = {}
        hooks = [self.decoder.blocks[name].register_forward_hook(_keeping(found, name)) for name in self.sides]
        try:
            logits = self.head(self.decoder(features))
        finally:
            for hook in hooks:
                hook.remove()
        sides = (head(found[name]) for name, head in zip(self.sides, self.side_heads, strict=True))
        size = image.shape[-2:]
        return Outputs(logits, tuple(functional.interpolate(side, size, mode="bilinear") for side in sides))


def _keeping(found: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[name] = output

    return keep


def _sides(decoder: Any) -> list[str]:
    """Return the nodes of the finest row with a skip but its last, which the head is on; most nodes behind it first."""
    row = max(index for index, channels in enumerate(decoder.skip_channels) if channels > 0)
    return [f"x_{column}_{row}" for column in range(1, row + 1)]


def _made(family: str, config: Network, encoder: nn.Module, in_channels: int, classes: int) -> Any:
    """Return the library's network, with an encoder of its own."""
    try:
        import segmentation_models_pytorch as library  # here: it takes seconds that other networks need not pay
    except ModuleNotFoundError as error:
        raise ValueError(
            f"name: {config.name} needs segmentation-models-pytorch; pip install segmentation-models-pytorch, or "
            "take another network, such as timm_unet"
        ) from error
    if config.norm not in NORMS:
        raise ValueError(f"norm: got {config.norm}; {config.name} has {', '.join(NORMS)}")
    info: Any = encoder.feature_info
    strides = info.reduction()
    depth = len(strides) + (strides[0] == 4)  # without a map at half the size the library puts an empty one
    widths = tuple(config.decoder_widths) or DECODER_WIDTHS[-depth:]
    if len(widths) != depth:
        raise ValueError(f"decoder_widths: got {list(widths)}; expected {depth} widths for this encoder")
    try:
        return getattr(library, family)(
            encoder_name=f"tu-{config.encoder}",
            encoder_depth=depth,
            encoder_weights=None,
            decoder_use_norm=NORMS[config.norm],
            decoder_channels=widths,
            decoder_attention_type=None if config.attention == "none" else config.attention,
            in_channels=in_channels,
            classes=classes,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"encoder: {config.encoder!r} does not fit {config.name} ({error}); try resnet34") from error
