"""What a level of matching hands to the next: positions and their scores."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Matches:
    """H_l and S_l: the K nearest neighbours of every pixel, best first unless a function says otherwise.

    positions: B,K,2,h,w float32, (y, x) in pixels of the exemplar's map at this level, inside the map.
    scores: B,K,h,w float32, cosine similarity in [-1, 1]; -inf marks an empty slot (fewer than K distinct candidates).
    Filled slots of a pixel lie in distinct pixels of the exemplar (after rounding).
    """

    positions: Tensor
    scores: Tensor

    def __getitem__(self, index: int) -> Matches:
        """Those of one picture of the batch, as a batch of one."""
        index = operator.index(index)
        return Matches(self.positions[index].unsqueeze(0), self.scores[index].unsqueeze(0))

    def cpu(self) -> Matches:
        """The same matches in the CPU's memory."""
        return Matches(self.positions.cpu(), self.scores.cpu())

    def detach(self) -> Matches:
        """The same matches, cut off from the gradient."""
        return Matches(self.positions.detach(), self.scores.detach())
