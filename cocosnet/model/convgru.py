"""GRU-based refinement (Eq. 6-7): from the current matches and their history, a correction dH of every candidate.

`Refinement` is the paper's operator; `ConvRefinement` has the same inputs and no memory (third row of Table 5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.config import MatchingConfig
from cocosnet.model.convolution import Conv2d
from cocosnet.model.layers import in_bands, join_channels
from cocosnet.model.matches import Matches
from cocosnet.model.warp import of_axes, pixel_grid, sample

HALO = 7  # rows that a correction depends on above and below: six 3x3 convolutions and a 3x3 mean, one after the other
OFFSET_UNIT = 4.0  # px: a relative offset as large as this enters as 1, and as at most 2
SCORE_UNIT = 0.1  # a score that is lower by as much enters as -1; an empty slot enters as -2
HEAD_GAIN = 0.01  # scale of the last layer at the start: corrections begin near zero, yet every layer gets a gradient


class ConvGRU(nn.Module):
    """Eq. 6 with 3x3 convolutions. State and input: B,hidden,h,w and B,inputs,h,w."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.gates = Conv2d(hidden + inputs, 2 * hidden, 3, padding=1)
        self.proposal = Conv2d(hidden + inputs, hidden, 3, padding=1)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """One step: z, r, the proposal, and their blend. Returns the new state."""
        z, r = torch.sigmoid(self.gates(join_channels(state, x))).chunk(2, dim=1)
        proposal = torch.tanh(self.proposal(join_channels(r * state, x)))
        return (1 - z) * state + z * proposal


class MatchEncoder(nn.Module):
    """x_t of Eq. 6: features of f^x, f^y, O_t and S_t, side by side.

    f^y is read at each pixel's best match, so that it can be compared with f^x there. What O_t and S_t are is
    `config.inputs`: `absolute_motion` or `relative_motion`. Both serve every level and size with the same weights.
    """

    def __init__(self, config: MatchingConfig):
        super().__init__()
        hidden = config.hidden
        self.motion_of = relative_motion if config.inputs == "relative" else absolute_motion
        self.appearance = Conv2d(2 * config.channels, hidden, 1)
        self.motion = Conv2d(3 * config.candidates, hidden, 3, padding=1)
        self.join = Conv2d(2 * hidden, hidden, 3, padding=1)

    def forward(self, grid: Tensor, matches: Matches, features_x: Tensor, features_y: Tensor) -> Tensor:
        """Matches of K candidates, features B,C,h,w and B,C,H,W. Returns B,hidden,h,w.

        grid: 2,h,w, the pixels' own positions in the level, of which these may be some rows.
        """
        motion = self.motion_of(matches.positions - grid, matches.scores, features_y.shape[-2:])
        best = sample(features_y, matches.positions[:, :1]).squeeze(2)
        appearance = join_channels(features_x, best)
        x = join_channels(self.appearance(appearance), self.motion(motion))
        return F.relu(self.join(F.relu(x)))


def absolute_motion(offsets: Tensor, scores: Tensor, size: torch.Size) -> Tensor:
    """Offsets divided by the map's size, and scores as they are; empty slots (-inf) read as the lowest cosine, -1.

    offsets B,K,2,h,w in px; scores B,K,h,w; size (H, W). Returns B,3K,h,w.
    """
    offsets = offsets / of_axes(offsets, *size)
    return join_channels(offsets.flatten(1, 2), scores.clamp(min=-1))


def relative_motion(offsets: Tensor, scores: Tensor, size: torch.Size) -> Tensor:
    """How the candidates lie to each other, in units in which a fraction of a pixel and a hundredth of a cosine show.

    Offsets are taken from the mean of the best matches' over 3x3 pixels; all scores but the best from the best.
    Arguments and result as for `absolute_motion`; the size of the map plays no part.
    """
    around = F.avg_pool2d(offsets[:, 0], 3, 1, 1, count_include_pad=False).unsqueeze(1)
    offsets = ((offsets - around) / OFFSET_UNIT).clamp(-2, 2)
    best, others = scores[:, :1].clamp(min=-1), scores[:, 1:]
    others = ((others - best) / SCORE_UNIT).clamp(-2, 2)
    return join_channels(offsets.flatten(1, 2), best, others)


class Refinement(nn.Module):
    """dH = max_step * tanh(two convolutions of the GRU's state); h_0 = 0.

    The bound keeps an untrained or surprised network from throwing matches away; far corrections take several steps.
    """

    def __init__(self, config: MatchingConfig):
        super().__init__()
        self.max_step, self.hidden = config.max_step, config.hidden
        self.encode = MatchEncoder(config)
        self.memory = ConvGRU(config.hidden, config.hidden) if config.refinement == "gru" else Memoryless(config.hidden)
        self.head = nn.Sequential(
            Conv2d(config.hidden, config.hidden, 3, padding=1),
            nn.ReLU(),
            Conv2d(config.hidden, 2 * config.candidates, 3, padding=1),
        )
        with torch.no_grad():
            self.head[-1].weight.mul_(HEAD_GAIN)
            self.head[-1].bias.zero_()

    def forward(
        self, state: Tensor | None, matches: Matches, features_x: Tensor, features_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the new state B,hidden,h,w and dH B,K,2,h,w float32, in pixels of the level, within +-max_step.

        Without a gradient it goes band by band on a CPU, which gives the same in less time: a band stays in the cache.
        """
        grid = pixel_grid(*features_x.shape[-2:], features_x.device)
        maps = [grid, matches.positions, matches.scores, features_x, *([] if state is None else [state])]

        def refine(*rows: Tensor) -> tuple[Tensor, Tensor]:
            return self.refine(features_y, *rows)

        whole = torch.is_grad_enabled() or features_x.is_cuda
        state, step = refine(*maps) if whole else in_bands(refine, maps, HALO)
        return state, step.unflatten(1, (-1, 2))

    def refine(
        self,
        features_y: Tensor,
        grid: Tensor,
        positions: Tensor,
        scores: Tensor,
        features_x: Tensor,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The operator on a map or on some of its rows: the new state, and dH with (y, x) of each candidate in turn."""
        x = self.encode(grid, Matches(positions, scores), features_x, features_y)
        state = x.new_zeros(x.shape[0], self.hidden, *x.shape[-2:]) if state is None else state
        state = self.memory(state, x)
        return state, self.max_step * torch.tanh(self.head(state).float())


class Memoryless(nn.Module):
    """A plain convolution in the GRU's place, which forgets: the third row of Table 5."""

    def __init__(self, hidden: int):
        super().__init__()
        self.conv = Conv2d(hidden, hidden, 3, padding=1)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Ignores the state. B,hidden,h,w -> B,hidden,h,w."""
        return F.relu(self.conv(x))
