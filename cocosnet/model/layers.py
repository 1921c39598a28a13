"""Blocks that several networks share: spectral normalisation, SPADE, residual blocks, padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from cocosnet.model.convolution import Conv2d
from cocosnet.precision import without_autocast

LEAK = 0.2  # slope of every LeakyReLU (release)
Size = torch.Size | tuple[int, int]  # H, W
BAND = 64  # rows that `in_bands` works on at once: what a band needs stays in a processor's cache
SPADE_HALO = 4  # rows that a SPADE block's row depends on above and below: four 3x3 convolutions one after the other


def conv(
    inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, bias: bool = True, spectral: bool = False
) -> nn.Module:
    """A convolution that keeps the size (at stride 1), borders padded with zeros; optionally spectrally normalised."""
    layer = Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer) if spectral else layer


def fold_spectral_norms(model: nn.Module) -> None:
    """Make every spectrally normalised weight of a model in evaluation mode the number that it stands for, in place.

    It computes the same from then on, without working the norms out in every pass; it can no longer be trained.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def in_own_type(x: Tensor) -> contextlib.AbstractContextManager:
    """The context in which norms and resizing give back x's type, whatever autocast is on.

    CUDA's autocast would make float32 of them, and so of most of what the backward pass keeps; a CPU's does not.
    """
    return without_autocast(x.device) if x.is_cuda else contextlib.nullcontext()


def positional_norm(x_BCHW: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation over the channels of each position (Eq. 9).

    A layer norm over channels, which lie together in the channels-last layout; its sums are float32 whatever x is.
    """
    with in_own_type(x_BCHW):
        return F.layer_norm(x_BCHW.permute(0, 2, 3, 1), x_BCHW.shape[1:2]).permute(0, 3, 1, 2)


def enlarge(x_BCHW: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bring a map to h,w = `size` bilinearly, in its own type."""
    with in_own_type(x_BCHW):
        return F.interpolate(x_BCHW, size=size, mode="bilinear", align_corners=False)


class Spade(nn.Module):
    """Spatially-adaptive denormalisation, Eq. 9: alpha(w) * (T - mu) / sigma + beta(w), two convolutions a map.

    alpha is predicted as 1 + conv, so that a fresh layer passes its input on.
    """

    def __init__(self, channels: int, guide_channels: int, hidden: int):
        super().__init__()
        self.shared = conv(guide_channels, hidden)
        self.alpha_beta = conv(hidden, 2 * channels)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x B,C,h,w; guide B,G,H,W of any size, resized to x. Returns B,C,h,w."""
        guide = resize_guide(guide, x.shape[-2:])
        alpha, beta = self.alpha_beta(F.relu(self.shared(guide))).chunk(2, dim=1)
        return torch.addcmul(beta, positional_norm(x), 1 + alpha)


class SpadeBlock(nn.Module):
    """A residual block of two SPADE-normalised 3x3 convolutions; a 1x1 shortcut where the widths differ (release)."""

    def __init__(self, inputs: int, outputs: int, guide_channels: int, hidden: int):
        super().__init__()
        middle = min(inputs, outputs)
        self.norm_0, self.conv_0 = Spade(inputs, guide_channels, hidden), conv(inputs, middle, spectral=True)
        self.norm_1, self.conv_1 = Spade(middle, guide_channels, hidden), conv(middle, outputs, spectral=True)
        self.shortcut = conv(inputs, outputs, 1, bias=False, spectral=True) if inputs != outputs else nn.Identity()
        self.recompute = False  # whether the backward pass computes the block again instead of keeping what is inside

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x B,inputs,h,w; guide B,G,H,W. Returns B,outputs,h,w. Without a gradient it goes band by band on a CPU."""
        maps = (x, resize_guide(guide, x.shape[-2:]))
        if torch.is_grad_enabled():
            return (_recomputed(self._rows, *maps) if self.recompute else self._rows(*maps))[0]
        return (self._rows(*maps) if x.is_cuda else in_bands(self._rows, maps, SPADE_HALO))[0]

    def _rows(self, x: Tensor, guide: Tensor) -> tuple[Tensor]:
        """The block on a map or on some of its rows: x B,inputs,h,w and the guide B,G,h,w of the same size."""
        y = self.conv_0(F.leaky_relu(self.norm_0(x, guide), LEAK))
        y = self.conv_1(F.leaky_relu(self.norm_1(y, guide), LEAK))
        return (self.shortcut(x) + y,)


def _recomputed(function: Callable[..., tuple[Tensor, ...]], *maps: Tensor) -> tuple[Tensor, ...]:
    """`function(*maps)`, computed again by the backward pass; nothing in it is drawn at random."""
    return checkpoint(function, *maps, use_reentrant=False, preserve_rng_state=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance normalisation and PReLU, added to the input (release)."""

    def __init__(self, channels: int):
        super().__init__()
        # An instance norm removes what a bias adds, so a bias there could never learn.
        self.conv_0, self.conv_1 = conv(channels, channels, bias=False), conv(channels, channels, bias=False)
        self.activation_0, self.activation_1 = nn.PReLU(), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        """B,C,h,w -> B,C,h,w."""
        y = self.activation_0(instance_norm(self.conv_0(x)))
        return self.activation_1(x + instance_norm(self.conv_1(y)))


def instance_norm(x_BCHW: Tensor) -> Tensor:
    """Normalise each channel of each picture over its pixels; a map of one pixel, which has no spread, stays."""
    return _InstanceNorm.apply(x_BCHW) if x_BCHW.shape[-2] * x_BCHW.shape[-1] > 1 else x_BCHW


class _InstanceNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + 1e-5). Written out because PyTorch's own copies channels-last maps into the other
    layout, and its backward takes five times as long as this one on a CPU.

    All but one product is worked out in float32 or better, whatever the maps are. Of a picture that is mostly blank, as
    a pose or a studio photograph, bfloat16 would round each pixel alike, and what should cancel in the sums over them
    (variance, gradient of the convolution before) would not.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        mean, square = _pixel_mean(x), _mean_square(x)
        scale = torch.rsqrt((square - mean * mean).clamp(min=0) + 1e-5)
        y = torch.addcmul(-mean * scale, x, scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        mean, along = _pixel_mean(gradient), _pixel_mean(gradient * y)
        return ((gradient - mean - y * along) * scale).to(y.dtype)


def _mean_square(x: Tensor) -> Tensor:
    """Over the pixels, like `_pixel_mean`; band by band, since room for all squares costs more time than they do."""
    bands = (x,) if torch.compiler.is_compiling() else x.split(BAND, dim=2)
    squares = (rows.to(_wide(x)).square() for rows in bands)
    return sum(_pixel_mean(rows) * (rows.shape[2] / x.shape[2]) for rows in squares)


def _pixel_mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True, dtype=_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    """float32 or better. PyTorch 2.6 cannot export torch.promote_types."""
    return x.dtype if x.dtype == torch.float64 else torch.float32


def resize_guide(guide: Tensor, size: torch.Size) -> Tensor:
    """Bring a guide to `size`: averaged where it shrinks by a whole factor, nearest otherwise (release: nearest)."""
    if guide.shape[-2:] == size:
        return guide
    factor = guide.shape[-1] // size[1]
    if factor > 1 and guide.shape[-2] == factor * size[0] and guide.shape[-1] == factor * size[1]:
        return F.avg_pool2d(guide, factor)
    return F.interpolate(guide, size=size, mode="nearest")


def pad_to_multiple(x_BCHW: Tensor, multiple: int) -> Tensor:
    """Repeat the bottom and right border until both sides are multiples of `multiple`."""
    bottom, right = (-x_BCHW.shape[-2]) % multiple, (-x_BCHW.shape[-1]) % multiple
    return F.pad(x_BCHW, (0, right, 0, bottom), mode="replicate") if bottom or right else x_BCHW


def cut(x: Tensor, size: Size) -> Tensor:
    """The upper left h,w = `size` of ..,H,W."""
    return x[..., : size[0], : size[1]]


def join_channels(*maps_BChw: Tensor) -> Tensor:
    """`torch.cat` over the channels, channels-last: several times quicker on a CPU than itself where maps lie so."""
    return torch.cat([x.permute(0, 2, 3, 1).contiguous() for x in maps_BChw], dim=3).permute(0, 3, 1, 2)


def in_bands(function: Callable[..., tuple[Tensor, ...]], maps: Sequence[Tensor], halo: int) -> tuple[Tensor, ...]:
    """`function(*maps)` band by band of `BAND` rows, for less memory and for what stays in a processor's cache.

    maps: tensors ..,h,w of one size; but those after the first may be smaller, by a factor that divides BAND and halo.
    function: maps to a tuple of maps of the first one's size, a row of which depends on the `halo` rows above and below
    at most. The same result, whole where the maps have no more than `BAND` rows, and where a graph is traced, which
    then is of one map of whatever size.
    """
    height = maps[0].shape[-2]
    if torch.compiler.is_compiling() or height <= BAND:
        return function(*maps)
    whole: tuple[Tensor, ...] = ()
    for top in range(0, height, BAND):
        first, bottom = max(top - halo, 0), min(top + BAND, height)
        results = function(*(_rows(x, height, first, min(bottom + halo, height)) for x in maps))
        whole = whole or tuple(_room(part, height) for part in results)
        for target, part in zip(whole, results):
            target[..., top:bottom, :] = part[..., top - first : bottom - first, :]
    return whole


def _rows(x: Tensor, height: int, first: int, last: int) -> Tensor:
    """What of a map ..,h,w lies in the rows from `first` to before `last` of one of `height` rows."""
    factor = height // x.shape[-2]
    return x[..., first // factor : last // factor, :]


def _room(part: Tensor, height: int) -> Tensor:
    """Room for a map of that many rows of which `part` is a band, in its layout."""
    last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (*part.shape[:-2], height, part.shape[-1])
    return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
