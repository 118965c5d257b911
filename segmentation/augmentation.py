"""Random changes of image and mask together; whatever changes colours alone leaves the mask as it is.

Every sample has its own draw, taken from the generator that is passed in and from nowhere else. Quarter turns and
flips move pixels without touching their values. Rotation, scale, shift, elastic deformation, distorted grid and lens
become one grid, so that a pixel is interpolated once: bilinear in the image, nearest in the mask, mirrored at the
border so that no class is made up there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from segmentation.networks.volume import to_volume

Augmenter = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]
MOVES = ("rotate_degrees", "scale", "translate", "elastic", "grid_distortion", "optical_distortion")
"""What becomes one grid."""
GRID_STEPS = 5
"""Cells of the distorted grid along each axis."""
BIAS_TERMS = tuple((row, column) for row in range(4) for column in range(4 - row) if row + column)
"""Powers of the place down and to the right in each term of the bias field, a polynomial of third order."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training samples are varied; all zero: not at all."""

    horizontal_flip: float = 0.5
    """Probability of mirroring left and right."""
    vertical_flip: float = 0.5
    """Probability of mirroring top and bottom."""
    rotate90: float = 0.5
    """Probability of a quarter turn; square images only."""
    rotate_degrees: float = 0.0
    """Largest rotation to either side, in degrees."""
    scale: float = 0.0
    """Largest change of size, 0.2 for 1/1.2 to 1.2 times."""
    translate: float = 0.0
    """Largest shift, as a part of height and width."""
    elastic: float = 0.0
    """Typical shift of an elastic deformation, in pixels."""
    elastic_smoothness: float = 8.0
    """Distance over which the elastic deformation varies, in pixels."""
    elastic_probability: float = 1.0
    """Probability of the elastic deformation."""
    grid_distortion: float = 0.0
    """Largest change of the width of the rows and columns of a grid of 5 x 5 cells, 0.2 for 0.8 to 1.2 times."""
    grid_distortion_probability: float = 1.0
    """Probability of the distorted grid."""
    optical_distortion: float = 0.0
    """Largest coefficient of a lens's distortion: a pixel comes from r * (1 + k * r * r) away from the middle, r being
    1 at the corners."""
    optical_distortion_probability: float = 1.0
    """Probability of the lens's distortion."""
    brightness: float = 0.0
    """Largest amount added to all normalised values, one draw an image."""
    brightness_factor: float = 0.0
    """Largest change of all stored values, 0.2 for 0.8 to 1.2 times; black stays black."""
    contrast: float = 0.0
    """Largest change of the distance from an image's mean, 0.2 for 0.8 to 1.2 times."""
    gamma: float = 0.0
    """Largest change of the exponent, 0.2 for 1/1.2 to 1.2, between an image's smallest and largest value."""
    bias_field: float = 0.0
    """Largest coefficient of the bias field: the exponential of a polynomial of third order in the place, -1 to 1,
    that stored values are multiplied with, as of a coil near the body; black stays black."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels."""
    motion: float = 0.0
    """Longest way that the image moves in a random direction while it is taken, in pixels."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, in normalised values."""
    colour_probability: float = 1.0
    """Probability of each of brightness, brightness_factor, contrast, gamma, bias_field, blur, motion and noise, where
    they are not 0."""
    gamma_probability: float | None = None
    """Probability of gamma; null: colour_probability."""
    bias_field_probability: float | None = None
    """Probability of the bias field; null: colour_probability."""
    blur_probability: float | None = None
    """Probability of the blur; null: colour_probability."""
    motion_probability: float | None = None
    """Probability of the motion; null: colour_probability."""
    noise_probability: float | None = None
    """Probability of the noise; null: colour_probability."""

    def __post_init__(self) -> None:
        """Refuse what is no probability, amount or angle."""
        shares = ("horizontal_flip", "vertical_flip", "rotate90", "translate", "contrast", "brightness_factor")
        for name in (*shares, *(field.name for field in fields(self) if field.name.endswith("_probability"))):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected 0 to 1")
        if 3 * self.optical_distortion >= 1:
            raise ValueError(f"optical_distortion: got {self.optical_distortion}; expected less than 1/3, or it folds")
        if self.grid_distortion >= 1:
            raise ValueError(f"grid_distortion: got {self.grid_distortion}; expected less than 1, or cells vanish")
        for field in fields(self):
            if (getattr(self, field.name) or 0) < 0:
                raise ValueError(f"{field.name}: got {getattr(self, field.name)}; expected 0 or more")
        if self.elastic_smoothness < 1:
            raise ValueError(f"elastic_smoothness: got {self.elastic_smoothness}; expected at least 1 pixel")


NONE = Augmentation(horizontal_flip=0, vertical_flip=0, rotate90=0)


def build(config: Augmentation, black: Sequence[float] = (0.0,), slices: int = 0) -> Augmenter:
    """Return a function of image (B, C, H, W) float, mask (B, H, W) or (B, K, H, W) int64, and a generator.

    It returns new tensors of the same shapes and types, equal for equal generator states. Flips and quarter turns take
    masks that are coarser than their images, too.
    black: what normalising makes of a stored 0, in each channel or in all.
    slices: of volumes, which come as tall images, see `networks.volume`: all slices of one are changed alike.
    """
    if slices:
        of_slice = [value for value in black for _ in range(slices)] if len(black) > 1 else black
        return functools.partial(_in_plane, build(config, of_slice), slices)
    steps = [step for step, on in _steps(config, black) if on]

    def augment(image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        for step in steps:
            image, mask = step(config, image, mask, generator)
        return image, mask

    return augment


def _in_plane(
    augment: Augmenter, slices: int, image: Tensor, mask: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Change volumes, the slices of each as channels of one image."""
    moved, moved_mask = augment(
        to_volume(image, slices).flatten(1, 2), to_volume(mask, slices).flatten(1, -3), generator
    )
    return moved.reshape(image.shape), moved_mask.reshape(mask.shape)


Step = Callable[[Augmentation, Tensor, Tensor, Generator], tuple[Tensor, Tensor]]


def _steps(config: Augmentation, black: Sequence[float]) -> list[tuple[Step, bool]]:
    """Return every step in order, and whether the configuration asks for it."""
    moves = sum(getattr(config, name) for name in MOVES)
    colours: dict[str, Step] = {
        "gamma": _gamma,
        "bias_field": functools.partial(_bias_field, black),
        "contrast": _contrast,
        "brightness": _brightness,
        "brightness_factor": functools.partial(_brightness_factor, black),
        "blur": _blur,
        "motion": _motion,
        "noise": _noise,
    }
    return [
        (_lay, config.horizontal_flip + config.vertical_flip + config.rotate90 > 0),
        (_warp, moves > 0),
        *((_perhaps(step, _probability(config, name)), getattr(config, name) > 0) for name, step in colours.items()),
    ]


def _probability(config: Augmentation, name: str) -> float:
    """Return that of a change of colour: its own, or the one for all."""
    own: float | None = getattr(config, f"{name}_probability", None)
    return config.colour_probability if own is None else own


def _perhaps(step: Step, probability: float) -> Step:
    """Return the change of colour with a probability, drawn for each sample."""
    if probability == 1:
        return step

    def tried(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        chosen = _chosen(probability, len(image), generator)
        return torch.where(_column(chosen, image), step(config, image, mask, generator)[0], image), mask

    return tried


def _chosen(probability: float, count: int, generator: Generator) -> Tensor:
    """Return which of so many samples are changed, (count,)."""
    return torch.rand(count, generator=generator) < probability


def _lay(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Lay each sample in one of the eight ways that flips and a quarter turn make, all in one gather."""
    height, width = image.shape[-2:]
    if config.rotate90 and height != width:
        raise ValueError(f"rotate90: images are {width}x{height}; set it to 0 or use square tiles")
    chances = torch.tensor([[config.horizontal_flip], [config.vertical_flip], [config.rotate90]])
    chosen = torch.rand((3, len(image)), generator=generator) < chances
    way = chosen[0] + 2 * chosen[1] + 4 * chosen[2]
    way = way.to(image.device)
    # A mask may be coarser than its image.
    sources = [_ways(*planes.shape[-2:], image.device)[way] for planes in (image, mask)]  # (B, H * W) each
    return _gathered(image, sources[0]), _gathered(mask, sources[1])


@functools.lru_cache(maxsize=4)
def _ways(height: int, width: int, device: torch.device) -> Tensor:
    """Return (8, H * W): which pixel each place shows, for each way to lay a picture; the last 4 if it is square."""
    pixels = torch.arange(height * width, device=device).view(height, width)
    flipped = [pixels, pixels.flip(-1), pixels.flip(-2), pixels.flip(-1, -2)]
    turned = [way.rot90(1) for way in flipped] if height == width else []
    return torch.stack([way.flatten() for way in flipped + turned])


def _gathered(planes: Tensor, source: Tensor) -> Tensor:
    """Return (B, ..., H, W) with the pixels of each sample in the order of `source` (B, H * W)."""
    flat = planes.reshape(len(planes), -1, source.shape[-1])
    return flat.gather(-1, source[:, None].expand(-1, flat.shape[1], -1)).view(planes.shape)


def _warp(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    grid = _grid(config, image, generator)
    planes = mask if mask.ndim == 4 else mask[:, None]
    # Class ids below 2**24 are exact in float32, and nearest copies them.
    moved = functional.grid_sample(planes.float(), grid, mode="nearest", padding_mode="reflection", align_corners=False)
    image = functional.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return image, moved.to(mask.dtype).view(mask.shape)


def _grid(config: Augmentation, image: Tensor, generator: Generator) -> Tensor:
    """Return (B, H, W, 2): where in [-1, 1] each pixel comes from."""
    count, _, height, width = image.shape
    angle = _uniform(count, generator) * math.radians(config.rotate_degrees)
    zoom = (1 + config.scale) ** -_uniform(count, generator)
    shift = 2 * config.translate * torch.stack([_uniform(count, generator), _uniform(count, generator)], dim=1)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # Coordinates run from -1 to 1 on both axes, so a rotation has to undo the shape of the image.
    rows = torch.stack([cos, -sin * height / width, sin * width / height, cos], dim=1).view(count, 2, 2)
    theta = torch.cat([rows, shift[:, :, None]], dim=2).to(image.device)
    grid = functional.affine_grid(theta, [count, 1, height, width], align_corners=False)
    if config.elastic:
        grid = grid + _elastic(config, image, generator)
    if config.grid_distortion:
        grid = grid + _grid_distortion(config, image, generator)
    return _seen_through_a_lens(config, grid, generator) if config.optical_distortion else grid


def _seen_through_a_lens(config: Augmentation, grid: Tensor, generator: Generator) -> Tensor:
    """Return a grid (B, H, W, 2) drawn to the middle, or away from it, the more so the farther away.

    Source: Brown 1966, Decentering distortion of lenses, its first radial term.
    """
    count, height, width = grid.shape[:3]
    strength = config.optical_distortion * _uniform(count, generator)
    strength = strength * _chosen(config.optical_distortion_probability, count, generator)
    # Distances in pixels, or a long picture would be bent more along its short side.
    sides = torch.tensor([width, height], dtype=grid.dtype, device=grid.device)
    radius = (grid * sides).square().sum(-1, keepdim=True) / sides.square().sum()
    return grid * (1 + strength.view(-1, 1, 1, 1).to(grid.device) * radius)


def _elastic(config: Augmentation, image: Tensor, generator: Generator) -> Tensor:
    """Return (B, H, W, 2) smooth random shifts with a deviation of `elastic` pixels."""
    count, _, height, width = image.shape
    coarse = (max(2, round(height / config.elastic_smoothness)), max(2, round(width / config.elastic_smoothness)))
    draws = torch.randn((count, 2, *coarse), generator=generator)
    smooth = functional.interpolate(draws, (height, width), mode="bicubic", align_corners=True)
    pixels = smooth / smooth.std(dim=(-2, -1), keepdim=True).clamp_min(1e-6) * config.elastic
    if config.elastic_probability < 1:
        pixels = pixels * _chosen(config.elastic_probability, count, generator).view(-1, 1, 1, 1)
    size = torch.tensor([width, height], dtype=torch.float32).view(2, 1, 1)
    return (pixels * 2 / size).permute(0, 2, 3, 1).to(image.device)


def _grid_distortion(config: Augmentation, image: Tensor, generator: Generator) -> Tensor:
    """Return (B, H, W, 2) shifts that stretch some rows and columns of a grid and squeeze the others."""
    count, _, height, width = image.shape
    draws = torch.rand((2, count, GRID_STEPS), generator=generator) * 2 - 1
    chosen = _chosen(config.grid_distortion_probability, count, generator).view(-1, 1)
    down, right = (
        _stretched(1 + config.grid_distortion * draws[axis] * chosen, size) for axis, size in enumerate((height, width))
    )
    both = right[:, None, :].expand(-1, height, -1), down[:, :, None].expand(-1, -1, width)
    return torch.stack(both, dim=-1).to(image.device)


def _stretched(cells: Tensor, size: int) -> Tensor:
    """Return (B, size): by how much each pixel of an axis from -1 to 1 moves where cells have these widths."""
    ends = torch.cat([torch.zeros(len(cells), 1), cells.cumsum(1)], dim=1)
    ends = 2 * ends / ends[:, -1:] - 1  # (B, GRID_STEPS + 1), where the cells begin and end
    place = (torch.arange(size) + 0.5) / size * GRID_STEPS
    cell = place.long().clamp_max(GRID_STEPS - 1)
    moved = torch.lerp(ends[:, cell], ends[:, cell + 1], (place - cell).expand(len(cells), -1))
    return moved - (2 * place / GRID_STEPS - 1)


def _gamma(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    exponent = _column((1 + config.gamma) ** _uniform(len(image), generator), image)
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    spread = (high - low).clamp_min(1e-12)
    return ((image - low) / spread).pow(exponent) * spread + low, mask


def _bias_field(
    black: Sequence[float], config: Augmentation, image: Tensor, mask: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Source: Van Leemput et al. 1999, Automated model-based bias field correction of MR images of the brain."""
    count, _, height, width = image.shape
    down, right = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]
    terms = torch.stack([down**row * right**column for row, column in BIAS_TERMS])  # (T, H, W)
    coefficients = config.bias_field * (torch.rand((count, len(terms)), generator=generator) * 2 - 1)
    field = torch.einsum("bt,thw->bhw", coefficients, terms).exp()[:, None].to(image.device)
    zero = torch.tensor(black, dtype=image.dtype, device=image.device).view(-1, 1, 1)
    return (image - zero) * field + zero, mask


def _contrast(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    factor = _column(1 + config.contrast * _uniform(len(image), generator), image)
    mean = image.mean((1, 2, 3), keepdim=True)
    return (image - mean) * factor + mean, mask


def _brightness(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    return image + _column(config.brightness * _uniform(len(image), generator), image), mask


def _brightness_factor(
    black: Sequence[float], config: Augmentation, image: Tensor, mask: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    factor = _column(1 + config.brightness_factor * _uniform(len(image), generator), image)
    zero = torch.tensor(black, dtype=image.dtype, device=image.device).view(-1, 1, 1)
    return (image - zero) * factor + zero, mask


def _blur(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    widths = config.blur * torch.rand(len(image), generator=generator)
    size = 2 * min(math.ceil(3 * config.blur), (min(image.shape[-2:]) - 1)) + 1
    blurred = [
        transforms.gaussian_blur(one, [size, size], [max(float(width), 1e-3)] * 2)
        for one, width in zip(image, widths, strict=True)
    ]
    return torch.stack(blurred), mask


def _motion(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the mean of the image along a way, by shifts of a pixel at most."""
    count, _, height, width = image.shape
    angle, length = math.pi * _uniform(count, generator), config.motion * torch.rand(count, generator=generator)
    way = torch.stack([angle.cos() * length * 2 / width, angle.sin() * length * 2 / height], dim=1)
    still = torch.eye(2).expand(count, 2, 2)
    total = torch.zeros_like(image)
    shares = torch.linspace(-0.5, 0.5, math.ceil(config.motion) + 1)
    for share in shares:
        theta = torch.cat([still, (share * way)[:, :, None]], dim=2).to(image.device)
        grid = functional.affine_grid(theta, list(image.shape), align_corners=False)
        total += functional.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    return total / len(shares), mask


def _noise(config: Augmentation, image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    width = _column(config.noise * torch.rand(len(image), generator=generator), image)
    # Drawn on the CPU, so that a GPU gets the same noise.
    return image + width * torch.randn(image.shape, generator=generator).to(image.device), mask


def _uniform(count: int, generator: Generator) -> Tensor:
    """Return (count,) between -1 and 1."""
    return torch.rand(count, generator=generator) * 2 - 1


def _column(values: Tensor, image: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1).to(image.device)
