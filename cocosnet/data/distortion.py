"""The geometric distortion T that makes a pseudo exemplar of x_B (Section 3.4): an affine map, then a spline.

Convention: as in `cocosnet.model.warp`, a position is (y, x) in px with pixel centres at integers. A grid is a backward
map, and so made the other way round: the output pixel p shows the input at grid[p]. Outside, the picture is continued
by reflection.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.config import DistortionConfig
from cocosnet.model.warp import pixel_grid


def distort(image: Tensor, config: DistortionConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A distorted copy, every picture of the batch in its own way. Channels move together: stack what belongs together.

    Args:
        image: B,C,H,W float32, e.g. a picture and its condition concatenated.
        generator: on the CPU; the only source of randomness.

    Returns:
        The copy B,C,H,W float32, and its backward grid B,2,H,W: the copy's pixel p shows `image` at grid[p].
    """
    batch, _, height, width = image.shape
    grid = random_grid(batch, height, width, config, generator).to(image.device)
    return apply_grid(image, grid), grid


def random_grid(batch: int, height: int, width: int, config: DistortionConfig, generator: torch.Generator) -> Tensor:
    """Random backward grids, B,2,H,W float32 positions (y, x) in px, which may lie outside the picture."""
    points = config.tps_grid**2
    shifts = torch.randn(batch, points, 2, generator=generator) * config.tps * torch.tensor([height, width])
    matrix, offset = _random_affine(batch, height, width, config, generator)
    mirrored = torch.rand(batch, 1, 1, generator=generator) < config.flip
    bend = (_spline_basis(config.tps_grid, height, width) @ shifts).transpose(1, 2)
    centre = torch.tensor([(height - 1) / 2, (width - 1) / 2]).view(2, 1)
    grid = matrix @ (pixel_grid(height, width).flatten(1) + bend - centre) + centre + offset
    rows, columns = grid.split(1, dim=1)
    return torch.cat([rows, torch.where(mirrored, width - 1 - columns, columns)], 1).view(batch, 2, height, width)


def apply_grid(image: Tensor, grid: Tensor) -> Tensor:
    """Read B,C,H,W float32 bilinearly at positions (y, x) in px, B,2,h,w; reflected outside. Returns B,C,h,w."""
    height, width = image.shape[-2:]
    span = grid.new_tensor([max(height - 1, 1), max(width - 1, 1)]).view(1, 2, 1, 1)
    normalised = (grid * (2 / span) - 1).flip(1).permute(0, 2, 3, 1)
    return F.grid_sample(image, normalised, mode="bilinear", padding_mode="reflection", align_corners=True)


def spline_basis(points: Tensor, queries: Tensor) -> Tensor:
    """The thin-plate spline as a linear map, M,N float64: its product with values at N points is those at M queries.

    Solves, in closed form, for the interpolant of least bending (Bookstein 1989): a sum of U(r) = r^2 log r around the
    points, plus a plane, with weights orthogonal to all planes.

    Args:
        points: N,2, not all on one line. queries: M,2.
    """
    points, queries = points.double(), queries.double()
    count = len(points)
    plane = torch.cat([torch.ones(count, 1, dtype=torch.float64), points], 1)
    system = torch.zeros(count + 3, count + 3, dtype=torch.float64)
    system[:count, :count] = _kernel(points, points)
    system[:count, count:], system[count:, :count] = plane, plane.T
    terms = torch.cat([_kernel(queries, points), torch.ones(len(queries), 1, dtype=torch.float64), queries], 1)
    return terms @ torch.linalg.inv(system)[:, :count]


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    """U(r) between all pairs, N,M; 0 at r = 0."""
    squared = (first[:, None] - second[None]).square().sum(2)
    return 0.5 * torch.xlogy(squared, squared)


@functools.lru_cache(maxsize=4)
def _spline_basis(side: int, height: int, width: int) -> Tensor:
    """`spline_basis` from side x side control points spread over the picture to all its pixels, H*W,side^2 float32."""
    axis = torch.linspace(0, 1, side)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), 2).view(-1, 2)
    span = torch.tensor([max(height - 1, 1), max(width - 1, 1)]).view(2, 1)
    return spline_basis(points, (pixel_grid(height, width).flatten(1) / span).T).float()


def _random_affine(
    batch: int, height: int, width: int, config: DistortionConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rotation times scale, B,2,2, and translation, B,2,1, in px, so that shapes keep their proportions."""
    angle, scale, down, across = (torch.rand(batch, 4, generator=generator) * 2 - 1).unbind(1)
    angle, scale = angle * math.radians(config.rotate), 1 + scale * config.scale
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cosine, sine, -sine, cosine], 1).view(batch, 2, 2)
    offset = torch.stack([down * height, across * width], 1).view(batch, 2, 1) * config.translate
    return matrix, offset
