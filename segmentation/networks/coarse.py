"""Networks that turn an image (B, C, H, W) into logits of its cells, (B, K, H // scale_factor, W // scale_factor).

A cell is a square of scale_factor x scale_factor pixels that has one class in the mask. The three networks are those of
the ESD system (IEEE GRSS DFC2021, track DSE) as their specification has them: every layer learns, logits are not
activated, and weights that are asked for are loaded. `features` of each is what its last convolution, 1 wide, sees of
a cell.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation import checkpoints
from segmentation.checkpoints import CheckpointError
from segmentation.epoch import DataError
from segmentation.networks.unet import UNet

logger = logging.getLogger(__name__)

LEVELS = 5
"""The most that n_encoders can be."""
STRIDE = 8
"""Of the features of torchvision's FCNs."""
FIRST, LAST, SIDE = "backbone.conv1.", "classifier.4.", "aux_classifier."
"""In torchvision's names: the layers that are replaced, and a second head, which is left out."""
ALTERNATIVES = (
    "give a file of torchvision's fcn_resnet101 weights (COCO), or set weights_path=null and pretrained=true to "
    "download them, or pretrained=false to start without"
)


@dataclass(frozen=True, kw_only=True)
class CoarseNetwork:
    """Which network of cells, and how large."""

    name: Literal["segmentation_cnn", "unet", "fcn_resnet101"] = "segmentation_cnn"
    """Family: segmentation_cnn (blocks of convolutions, each pooled, down to cells), unet (encoder and decoder with
    skips; its logits of pixels are pooled to cells), fcn_resnet101 (torchvision's, likewise)."""
    depth: int = 2
    """Convolutions of a block (segmentation_cnn)."""
    embedding_size: int = 64
    """Channels of the first block, or of the finest level; they double at each further one (segmentation_cnn, unet)."""
    pool_sizes: tuple[int, ...] = (5, 5, 2)
    """By how much each block is pooled; their product is scale_factor (segmentation_cnn)."""
    kernel_size: int = 3
    """Side of a convolution's kernel, odd (segmentation_cnn)."""
    n_encoders: int = 2
    """Times that the resolution is halved and doubled again, 1 to 5 (unet)."""
    pool: Literal["auto", "max", "avg"] = "auto"
    """How logits of pixels become those of cells; auto: max in unet, avg in fcn_resnet101."""
    scale_factor: int = 50
    """Pixels to the side of a cell."""
    pretrained: bool = False
    """Start from torchvision's published weights (COCO), downloaded once, in all layers but the first and the last
    (fcn_resnet101)."""
    weights_path: str | None = None
    """Start from this file of such weights instead: .pth or .safetensors (fcn_resnet101)."""
    seed_first: bool = False
    """Start the first layer, too, from these weights: each channel's filter is the mean of red's, green's and blue's,
    times 3 / channels (fcn_resnet101)."""

    def __post_init__(self) -> None:
        for name in ("depth", "embedding_size", "kernel_size", "scale_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {self.kernel_size}; expected an odd number, which has a middle")
        if not self.pool_sizes or min(self.pool_sizes) < 1:
            raise ValueError(f"pool_sizes: got {list(self.pool_sizes)}; expected one or more sizes of at least 1")
        if not 1 <= self.n_encoders <= LEVELS:
            raise ValueError(f"n_encoders: got {self.n_encoders}; expected 1 to {LEVELS}")


def check(network: CoarseNetwork, cells: int) -> None:
    """Raise ValueError, with the remedy, for a network that cannot be, or not for images of so many cells to the side.

    Nothing is built: this is for a configuration to ask before it is used.
    """
    side = cells * network.scale_factor
    images = f"images of {side} pixels ({cells} cells of scale_factor {network.scale_factor})"
    if network.name == "segmentation_cnn":
        _check_blocks(network, cells)
    elif network.name == "unet" and 2**network.n_encoders > side:
        raise ValueError(
            f"n_encoders: got {network.n_encoders}, which leaves nothing of {images}; expected at most "
            f"{side.bit_length() - 1}, or larger images"
        )
    elif network.name == "fcn_resnet101":
        if side <= STRIDE:
            raise ValueError(
                f"scale_factor: got {network.scale_factor}, but of {images} fcn_resnet101 leaves one pixel, which has "
                f"no variance to normalise by; expected more than {STRIDE} pixels"
            )
        if network.seed_first and not (network.pretrained or network.weights_path):
            raise ValueError("seed_first: got true without weights to start from; set pretrained=true or weights_path")


def _check_blocks(network: CoarseNetwork, cells: int) -> None:
    sizes, product = list(network.pool_sizes), math.prod(network.pool_sizes)
    if product != network.scale_factor:
        raise ValueError(
            f"pool_sizes: got {sizes}, whose product is {product}; expected {network.scale_factor}, which is "
            f"scale_factor, or set scale_factor={product}"
        )
    smallest = cells * sizes[-1]
    if network.kernel_size > smallest:
        raise ValueError(
            f"kernel_size: got {network.kernel_size}, but the last block sees maps of {smallest} pixels ({cells} "
            f"cells, pool_sizes {sizes}); expected at most {smallest}, or a larger last pool size"
        )


def parse_pool_sizes(text: str) -> tuple[int, ...]:
    """Return pool sizes from what the original's flag says: `5,5,2`.

    Raises:
        ValueError: for anything but whole numbers with commas between them.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"pool_sizes: got {text!r}; expected whole numbers with commas between them, such as 5,5,2")
    return tuple(map(int, parts))


def without_weights(network: CoarseNetwork) -> CoarseNetwork:
    """Return the same network without its pretrained start, for weights that come from a checkpoint."""
    return replace(network, pretrained=False, weights_path=None, seed_first=False)


def build(network: CoarseNetwork, in_channels: int, classes: int) -> SegmentationCNN | CellUNet | CellFCN:
    """Return the network with freshly drawn weights, or pretrained ones, on the CPU.

    Raises:
        DataError: where pretrained weights are asked for and cannot be had; never fresh ones instead.
    """
    if network.name == "segmentation_cnn":
        return SegmentationCNN(
            in_channels,
            classes,
            _doubling(network.embedding_size, len(network.pool_sizes)),
            network.pool_sizes,
            depth=network.depth,
            kernel_size=network.kernel_size,
        )
    most = network.pool == "max" or (network.pool == "auto" and network.name == "unet")
    pool = (nn.MaxPool2d if most else nn.AvgPool2d)(network.scale_factor)
    if network.name == "unet":
        return CellUNet(in_channels, classes, _doubling(network.embedding_size, network.n_encoders + 1), pool)
    return CellFCN(_transferred(network, in_channels, classes), pool)


def _doubling(first: int, count: int) -> list[int]:
    return [first * 2**level for level in range(count)]


class SegmentationCNN(nn.Module):
    """Blocks of convolutions with ReLU, each pooled at its end, and a head.

    widths, pool_sizes: one for each block.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        widths: Sequence[int],
        pool_sizes: Sequence[int],
        *,
        depth: int,
        kernel_size: int,
    ) -> None:
        super().__init__()
        inputs = [in_channels, *widths]
        self.encoders = nn.ModuleList(
            _block(inputs[at], widths[at], depth, kernel_size, size) for at, size in enumerate(pool_sizes)
        )
        self.head = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H // scale, W // scale) of an image (B, C, H, W)."""
        logits: Tensor = self.head(self.features(image))
        return logits

    def features(self, image: Tensor) -> Tensor:
        """Return what the head sees of each cell, (B, F, H // scale, W // scale)."""
        return self.levels(image)[-1]

    def levels(self, image: Tensor) -> list[Tensor]:
        """Return the map that each block ends in, finest first."""
        maps = [image]
        for encoder in self.encoders:
            maps.append(encoder(maps[-1]))
        return maps[1:]


def _block(in_channels: int, width: int, depth: int, kernel_size: int, pool_size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (in_channels, *[width] * (depth - 1)):
        layers += [nn.Conv2d(inputs, width, kernel_size, padding=kernel_size // 2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(pool_size))


class CellUNet(UNet):
    """A UNet whose logits are pooled to cells.

    widths: channels of each level, finest first, and of the bottleneck.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int], pool: nn.Module) -> None:
        super().__init__(in_channels, classes, widths[:-1], widths[-1])
        self.pool = pool

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H // scale, W // scale) of an image (B, C, H, W)."""
        logits: Tensor = self.pool(super().forward(image))
        return logits

    def features(self, image: Tensor) -> Tensor:
        """Return what the last convolution sees, pooled as the logits are: (B, F, H // scale, W // scale)."""
        features: Tensor = self.pool(super().features(image))
        return features


class CellFCN(nn.Module):
    """The layers of a torchvision FCN, under their names there, and its logits pooled to cells.

    Long, Shelhamer & Darrell 2015, arXiv:1411.4038.
    """

    def __init__(self, fcn: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        parts: Any = fcn
        # Without the second head: nobody's loss reads it, and several processes would wait for its gradients.
        self.backbone, self.classifier = parts.backbone, nn.Sequential(*parts.classifier)
        self.pool = pool

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H // scale, W // scale) of an image (B, C, H, W) of more than 8 pixels to the side."""
        return self._cells(self.classifier(self.backbone(image)["out"]), image)

    def features(self, image: Tensor) -> Tensor:
        """Return what the last convolution sees, enlarged and pooled as logits are: (B, F, H // scale, W // scale)."""
        return self._cells(self.classifier[:-1](self.backbone(image)["out"]), image)

    def _cells(self, maps: Tensor, image: Tensor) -> Tensor:
        cells: Tensor = self.pool(F.interpolate(maps, size=image.shape[-2:], mode="bilinear"))
        return cells


def _transferred(network: CoarseNetwork, in_channels: int, classes: int) -> nn.Module:
    """Return torchvision's network with its first layer for these channels and its last for these classes."""
    # Here, because it takes seconds that the other networks need not pay.
    from torchvision.models.segmentation import fcn_resnet101

    fcn: Any = fcn_resnet101(weights=None, weights_backbone=None)
    if network.pretrained or network.weights_path:
        _load(fcn, network)
    first = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    if network.seed_first:
        rgb = fcn.backbone.conv1.weight.detach()
        first.weight.data = (rgb.mean(1, keepdim=True) * 3 / in_channels).repeat(1, in_channels, 1, 1)
    fcn.backbone.conv1 = first
    fcn.classifier[4] = nn.Conv2d(512, classes, 1)
    return fcn  # type: ignore[no-any-return]


def _load(fcn: nn.Module, network: CoarseNetwork) -> None:
    """Copy the weights that are asked for into a network of torchvision, into every layer that is kept.

    Raises:
        DataError: if they cannot be had, or are not those of this network.
    """
    path = Path(network.weights_path) if network.weights_path else _published()
    try:
        weights = _read(path)
    except CheckpointError as error:
        raise DataError(f"weights_path: {error}; {ALTERNATIVES}") from error
    replaced = (LAST,) if network.seed_first else (FIRST, LAST)
    kept = {name: tensor for name, tensor in fcn.state_dict().items() if not name.startswith(replaced)}
    # Batch norm's counts of batches, which older files lack.
    given = {name: tensor for name, tensor in kept.items() if name.endswith("num_batches_tracked")}
    for name, tensor in weights.items():
        if torch.is_tensor(tensor) and not str(name).startswith((*replaced, SIDE)):
            given[name] = tensor
    if problems := checkpoints.mismatch(kept, given):
        raise DataError(f"weights_path: {path}: weights of another network: {problems}; {ALTERNATIVES}")
    fcn.load_state_dict(given, strict=False)


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return checkpoints.safetensors_weights(path)
    weights: Any = checkpoints.torch_weights(path)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path}: holds a {type(weights).__name__}; expected tensors by their names")
    return weights


def _published() -> Path:
    """Return the file of torchvision's own weights, downloaded if it is not there."""
    from torchvision.models.segmentation import FCN_ResNet101_Weights

    url = FCN_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.is_file():
        return path
    logger.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
    except Exception as error:  # of a connection, a disk or a damaged file; each means: no weights
        raise DataError(
            f"pretrained weights of 'fcn_resnet101' ({path.name}) are not in {path.parent} and cannot be had from "
            f"{url} ({type(error).__name__}: {error}); set weights_path to a file of them, or pretrained=false to "
            "start without"
        ) from error
    return path
