"""The release's matching, level by level: its search, its GRU and its soft warp, with its arithmetic.

Positions are kept as the release keeps them, as offsets from a pixel's own place, those in rows of all K candidates and
then those in columns: B,2K,h,w, which is also what its GRU reads. An offset becomes a flat index `row * width + column`
in floats, which is then cut to an integer: so a fraction of a row moves a match by columns. `compat: release-fixed`
rounds rows and columns apart, drops duplicates before the best are kept, and starts a level densely.

Matching turns on last bits: one changed match changes its neighbours in the next pass. So operations and their order
are the release's, also where another order would be the same on paper (docs/release.md).

Shapes: B batch, C channels, K candidates, h w the condition's map, H W the exemplar's map.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.config import MatchingConfig
from cocosnet.model.hierarchy import Level
from cocosnet.model.layers import in_bands
from cocosnet.model.matches import Matches
from cocosnet.model.patchmatch import best_first, drop_duplicates
from cocosnet.model.quick import compiled_module, is_plain
from cocosnet.model.warp import downsample, is_open, pixel_grid

WINDOW = (-2.0, 0.0, 2.0, 4.0)  # px, rows and columns around twice the coarser level's match
DENSE_WINDOW = (-1.0, 0.0, 1.0, 2.0)  # px, the same of release-fixed: even steps alone never reach an odd offset
ORDERS = {"horizontal-first": (-1, -2), "vertical-first": (-2, -1)}  # axes of an iteration's two passes
COARSE_CHUNK = 2**24  # similarities held at once at the coarse level: those of 64x64 positions all together
HALO = 11  # rows that a refined row depends on above and below: 3 + 1 + 1 of the encoder, 4 of the GRU, 2 of the head
MOTION = 64  # channels of the motion encoder's and the head's hidden layers
WITHOUT_ONEDNN = 20480  # numbers in one picture's map up to which PyTorch itself convolves it without oneDNN


class ReleaseHierarchy(nn.Module):
    """Coarse level exactly, then `iterations` of search and refinement a level. `widths`: channels, coarse to fine."""

    def __init__(self, widths: Sequence[int], config: MatchingConfig):
        super().__init__()
        self.theta = nn.ModuleList(Pointwise(width, config.channels, 1) for width in widths)
        self.phi = nn.ModuleList(Pointwise(width, config.channels, 1) for width in widths)
        self.patch_match = ReleasePatchMatch(config)
        self.temperature, self.iterations = config.temperature, config.iterations

    def forward(
        self,
        features_x: Sequence[Tensor],
        features_y: Sequence[Tensor],
        exemplar: Tensor,
        orders: Sequence[str] | None = None,
    ) -> list[Level]:
        """features: maps B,C_l,.. of unit vectors, coarse to fine; exemplar B,3,H,W; orders as for the model."""
        axes, levels = self._axes(orders), []
        for index, (x, y) in enumerate(zip(features_x, features_y)):
            x, y = _centred_unit(self.theta[index](x)), _centred_unit(self.phi[index](y))
            picture = downsample(exemplar, 2 ** (len(self.theta) - 1 - index))
            if index == 0:
                levels.append(self.coarse(x, y, picture))
                continue
            x, y = (f.contiguous(memory_format=torch.channels_last) for f in (x, y))  # as every search reads them
            mine = axes[(index - 1) * self.iterations : index * self.iterations]
            levels.append(self.patch_match(levels[-1].matches, x, y, picture, mine))
        return [Level(best_first(level.matches), level.warps) for level in levels]

    def coarse(self, x: Tensor, y: Tensor, picture: Tensor) -> Level:
        """Every position against every other: x B,C,h,w, y B,C,H,W, picture B,3,H,W. The best match alone is kept."""
        queries, values = x.flatten(2).transpose(1, 2), picture.flatten(2).transpose(1, 2)
        rows = None if is_open(values.shape[1]) else max(1, COARSE_CHUNK // (x.shape[0] * values.shape[1]))
        split = [queries] if rows is None else queries.split(rows, dim=1)
        parts = [self._attend(part, y.flatten(2), values) for part in split]
        weights, best, warp = (torch.cat(part, dim=1) for part in zip(*parts))
        size = x.shape[-2:]
        matches = Matches(places(best, size, y.shape[-1]), _as_maps(weights, size))
        return Level(matches, [_as_maps(warp, size)])

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """queries B,n,C, keys B,C,N, values B,N,3: cosine and number of the best key, B,n,1 each; mean value B,n,3."""
        scores = torch.matmul(queries, keys)
        weights = torch.softmax(scores / self.temperature, dim=-1)
        best = weights.topk(1, dim=-1).indices
        return scores.gather(-1, best), best, torch.matmul(weights, values)

    def _axes(self, orders: Sequence[str] | None) -> list[tuple[int, int]]:
        count = self.iterations * (len(self.theta) - 1)
        orders = ["horizontal-first"] * count if orders is None else list(orders)
        if len(orders) != count or not set(orders) <= set(ORDERS):
            raise ValueError(f"propagation_orders: expected {count} of {', '.join(ORDERS)}, got {orders}")
        return [ORDERS[order] for order in orders]


class ReleasePatchMatch(nn.Module):
    """The search and the refinement that all finer levels share."""

    def __init__(self, config: MatchingConfig):
        super().__init__()
        self.temperature, self.fixed = config.temperature, config.compat == "release-fixed"
        hidden = config.hidden
        self.initial_layer = nn.Sequential(
            nn.Conv2d(2 * config.channels, hidden, 3, padding=1), InstanceNorm(), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1), InstanceNorm(), nn.ReLU(),
        )  # fmt: skip
        self.refine_net = ReleaseRefinement(config.candidates, hidden)

    def forward(
        self, coarse: Matches, x: Tensor, y: Tensor, exemplar: Tensor, axes: Sequence[tuple[int, int]]
    ) -> Level:
        """coarse: the coarser level's; x B,C,h,w and y B,C,H,W unit vectors; exemplar B,3,H,W. One order of axes an
        iteration."""
        state, offsets = self.first_state(x, y), self.first_offsets(coarse)
        for order in axes:
            for axis in order:
                offsets, weights = self.keep_best(offsets, axis, x, y)
            state, step = self.refine_net(state, weights, offsets)
            offsets = offsets + step
        read = functools.partial(self._read, y=y, exemplar=exemplar)
        positions, scores, warp = in_bands(read, (offsets, x, pixel_grid(*x.shape[-2:], x.device)), halo=0)
        return Level(Matches(positions, scores), [warp])

    def _read(self, offsets: Tensor, x: Tensor, grid: Tensor, *, y: Tensor, exemplar: Tensor) -> tuple[Tensor, ...]:
        """Positions B,K,2,h,w, their cosines B,K,h,w and the warp B,3,h,w of some rows, as `_keep_best`."""
        size = x.shape[-2:]
        indices, scores = score(offsets, None, x, y, grid, self.fixed)
        weights = torch.softmax(scores / self.temperature, dim=-1)
        warp = (_gather(exemplar, indices) * weights.unsqueeze(1)).sum(-1).unflatten(2, size)
        return places(indices, size, y.shape[-1]), _as_maps(scores, size), warp

    def first_offsets(self, coarse: Matches) -> Tensor:
        """What a level starts from, B,2K,h,w. The release takes the coarser level's first slot, which the last
        refinement moved, and even steps around it; `release-fixed` takes the best slot and every step.
        """
        if self.fixed:
            return window_offsets(best_first(coarse), DENSE_WINDOW)
        return window_offsets(coarse, WINDOW)

    def first_state(self, x: Tensor, y: Tensor) -> Tensor:
        """The GRU's, of both pictures' features at the same pixel: B,hidden,h,w. Its sums run in the plain layout."""
        return self.initial_layer(_both(x.contiguous(), y.contiguous()))

    def keep_best(self, offsets: Tensor, axis: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The K offsets (B,2K,h,w) whose pixels are most similar, of one's own and both neighbours' along `axis`, and
        their softmax weights (B,K,h,w) among all 3K."""
        keep = functools.partial(self._keep_best, y=y, axis=axis)
        return in_bands(keep, (offsets, x, pixel_grid(*x.shape[-2:], x.device)), halo=1 if axis == -2 else 0)

    def _keep_best(self, offsets: Tensor, x: Tensor, grid: Tensor, *, y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """`keep_best` of some rows, whose pixels' own positions are grid 2,h,w."""
        size = offsets.shape[-2:]
        indices, scores = score(offsets, axis, x, y, grid, self.fixed)
        if self.fixed:
            distinct = drop_duplicates(places(indices, size, y.shape[-1]), _as_maps(scores, size))
            scores = distinct.flatten(2).transpose(1, 2)
        scores = torch.softmax(scores.div_(self.temperature), dim=-1)  # in place: there are three times K of them
        weights, order = scores.topk(offsets.shape[1] // 2, dim=-1)
        # In the plain layout, in which the refinement's sums run for one pair in the release.
        return to_offsets(indices, order, grid, y.shape[-1]), _as_maps(weights, size).contiguous()


class ReleaseRefinement(nn.Module):
    """The update block: softmax weights and raw offsets to a state, and from it to steps of all candidates."""

    def __init__(self, candidates: int, hidden: int):
        super().__init__()
        self.encoder = _MotionEncoder(candidates, hidden)
        self.gru = _SeparableGRU(hidden, hidden + 2 * candidates)
        self.flow_head = _Head(hidden, 2 * candidates)

    def forward(self, state: Tensor, weights: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """state B,hidden,h,w; weights B,K,h,w; offsets B,2K,h,w. Returns the state and unbounded steps B,2K,h,w."""
        return in_bands(self._rows, (state, weights, offsets), HALO)

    def _rows(self, state: Tensor, weights: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The operator on some rows of all three."""
        state = self.gru(state, self.encoder(weights, offsets))
        return state, self.flow_head(state)


class _MotionEncoder(nn.Module):
    def __init__(self, candidates: int, hidden: int):
        super().__init__()
        self.convc1, self.convc2 = Pointwise(candidates, MOTION, 1), nn.Conv2d(MOTION, MOTION, 3, padding=1)
        self.convf1 = nn.Conv2d(2 * candidates, MOTION, 7, padding=3)
        self.convf2 = nn.Conv2d(MOTION, MOTION, 3, padding=1)
        self.conv = nn.Conv2d(2 * MOTION, hidden, 3, padding=1)

    def forward(self, weights: Tensor, flow: Tensor) -> Tensor:
        scores = F.relu(self.convc2(F.relu(self.convc1(weights))))
        motion = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([scores, motion], dim=1))), flow], dim=1)


class _SeparableGRU(nn.Module):
    def __init__(self, hidden: int, inputs: int):
        super().__init__()
        for index, kernel in ((1, (1, 5)), (2, (5, 1))):
            padding = (kernel[0] // 2, kernel[1] // 2)
            for gate in "zrq":
                setattr(self, f"conv{gate}{index}", nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding))

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        for z_gate, r_gate, proposal in (
            (self.convz1, self.convr1, self.convq1),
            (self.convz2, self.convr2, self.convq2),
        ):
            z, r = side_by_side(torch.cat([state, x], dim=1), z_gate, r_gate)
            z, r = torch.sigmoid(z), torch.sigmoid(r)
            state = (1 - z) * state + z * torch.tanh(proposal(torch.cat([r * state, x], dim=1)))
        return state


class _Head(nn.Module):
    def __init__(self, hidden: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, MOTION, 3, padding=1)
        self.conv2 = nn.Conv2d(MOTION, outputs, 3, padding=1)

    def forward(self, state: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(state)))


class Pointwise(nn.Conv2d):
    """A convolution of one pixel, by the same library whatever the number of threads.

    That is oneDNN, but for small maps. With a single thread PyTorch takes another one, which adds the bias last
    instead of first.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = is_plain(x, weight) and x.dtype == weight.dtype == torch.float32  # first: a traced graph has no sizes
        if plain and self._is_alone() and (len(x) > 1 or x.numel() > WITHOUT_ONEDNN):
            return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)
        return super()._conv_forward(x, weight, bias)

    @staticmethod
    def _is_alone() -> bool:
        return torch.get_num_threads() == 1 and torch.backends.mkldnn.is_available()


class InstanceNorm(nn.Module):
    """Each channel of each picture over its pixels, as PyTorch computes it; a map of one pixel stays."""

    def forward(self, x: Tensor) -> Tensor:
        """B,C,h,w -> B,C,h,w."""
        return F.instance_norm(x) if x.shape[-2] * x.shape[-1] > 1 else x


def window_offsets(coarse: Matches, window: Sequence[float]) -> Tensor:
    """The first offsets of a level: a 4x4 grid around twice the coarser level's first one, at every finer pixel.

    coarse positions B,K,2,h,w -> B,32,2h,2w.
    """
    best = coarse.positions[:, :1] - pixel_grid(*coarse.positions.shape[-2:], coarse.positions.device)
    steps = best.new_tensor([(row, column) for row in window for column in window]).view(1, -1, 2, 1, 1)
    both = (2 * best + steps).transpose(1, 2).flatten(1, 2)
    return both.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def neighbours(offsets: Tensor, axis: int) -> Tensor:
    """The candidates of the previous neighbour along `axis`, one's own, the next one's: B,2K,h,w -> B,6K,h,w.

    Beyond the border there is offset 0.
    """
    size, nothing = offsets.shape[axis], torch.zeros_like(offsets.narrow(axis, 0, 1))
    previous = torch.cat([nothing, offsets.narrow(axis, 0, size - 1)], dim=axis)
    following = torch.cat([offsets.narrow(axis, 1, size - 1), nothing], dim=axis)
    return torch.cat([x.unflatten(1, (2, -1)) for x in (previous, offsets, following)], dim=2).flatten(1, 2)


def places(indices: Tensor, size: torch.Size, columns: int) -> Tensor:
    """Numbers of pixels B,hw,N in a map of `columns` columns to their rows and columns, B,N,2,h,w float32."""
    rows = indices // columns
    flat = torch.stack([rows, indices - rows * columns], dim=-1).float()
    return flat.permute(0, 2, 3, 1).unflatten(3, size)


def to_offsets(indices: Tensor, order: Tensor, grid: Tensor, columns: int) -> Tensor:
    """Offsets B,2K,h,w of the candidates `order` (B,hw,K) among numbers of pixels (B,hw,N).

    grid: as for `score`; columns: those of the exemplar's map.
    """
    compiled = compiled_module("release_compiled")[0] if is_plain(indices) else None
    return (reference_offsets if compiled is None else compiled.to_offsets)(indices, order, grid, columns)


def reference_offsets(indices: Tensor, order: Tensor, grid: Tensor, columns: int) -> Tensor:
    """The definition of `to_offsets`, in plain PyTorch."""
    kept = places(indices.gather(-1, order), grid.shape[-2:], columns) - grid
    return kept.transpose(1, 2).flatten(1, 2)


def score(
    offsets: Tensor, axis: int | None, x: Tensor, y: Tensor, grid: Tensor, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """Numbers of the pixels that candidates point to, and their dot products, B,hw,N int32 and float32.

    offsets B,2K,h,w; x B,C,h,w and y B,C,H,W. Along an `axis` the candidates of both neighbours join: N = 3K, else K.
    grid: 2,h,w, the pixels' own positions, which do not start at 0 where offsets and x are some rows of a map.
    rounded: rows and columns are rounded apart, instead of the number being cut.

    Compiled on a CPU where numba loads, and never while a gradient is recorded or the graph is traced.
    """
    plain = is_plain(offsets, x, y) and x.dtype == torch.float32
    compiled = compiled_module("release_compiled")[0] if plain else None
    return (reference_score if compiled is None else compiled.score)(offsets, axis, x, y, grid, rounded)


def reference_score(
    offsets: Tensor, axis: int | None, x: Tensor, y: Tensor, grid: Tensor, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition of `score`, in plain PyTorch, a candidate at a time."""
    offsets = offsets if axis is None else neighbours(offsets, axis)
    indices = pixel_numbers(offsets, grid, y.shape[-2:], rounded)
    queries = x.flatten(2)
    scores = [(queries * _gather(y, one).squeeze(-1)).sum(1).unsqueeze(-1) for one in indices.split(1, -1)]
    return indices, torch.cat(scores, dim=-1)


def pixel_numbers(offsets: Tensor, grid: Tensor, size: torch.Size, rounded: bool) -> Tensor:
    """Offsets B,2N,h,w from positions 2,h,w to the numbers `row * W + column` of pixels in a map of `size`, B,hw,N
    int32. NaN is 0."""
    place = offsets.unflatten(1, (2, -1)) + grid.unsqueeze(1)
    place = place.nan_to_num(0.0)
    rows, columns = place[:, 0].clamp(0, size[0] - 1), place[:, 1].clamp(0, size[1] - 1)
    if rounded:
        rows, columns = rows.round(), columns.round()
    return (rows * size[1] + columns).int().flatten(2).transpose(1, 2)


def side_by_side(x: Tensor, *layers: nn.Conv2d) -> tuple[Tensor, ...]:
    """Several convolutions of one input as a single one, which reads it once. The same numbers."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    joined = layers[0]._conv_forward(x, weight, bias)
    return joined.split([layer.out_channels for layer in layers], dim=1)


def _gather(values: Tensor, indices: Tensor) -> Tensor:
    """values B,C,H,W at numbers of pixels B,P,N: B,C,P,N."""
    flat = indices.flatten(1).long().unsqueeze(1).expand(-1, values.shape[1], -1)
    return values.flatten(2).gather(2, flat).unflatten(2, indices.shape[1:])


def _as_maps(values: Tensor, size: torch.Size) -> Tensor:
    """B,hw,N -> B,N,h,w, a view: a pixel's N numbers stay side by side."""
    return values.transpose(1, 2).unflatten(2, size)


def unit(x: Tensor) -> Tensor:
    """B,C,h,w -> the same at unit length over the channels, as the release divides."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def _centred_unit(x: Tensor) -> Tensor:
    return unit(x - x.mean(1, keepdim=True))


def _both(x: Tensor, y: Tensor) -> Tensor:
    """Both pictures' features B,C,.. as one map B,2C,h,w of x's size; the release has both of one size."""
    return torch.cat([x, resized(y, x.shape[-2:], mode="bilinear", align_corners=False)], dim=1)


def resized(x: Tensor, size: tuple[int, ...], **how: str | bool) -> Tensor:
    """`F.interpolate` to a size; a map of that size is not copied."""
    return x if not is_open(x.shape[-1]) and x.shape[-2:] == size else F.interpolate(x, size=size, **how)
