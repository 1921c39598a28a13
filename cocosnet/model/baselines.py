"""The paper's compared systems, with the generator, the losses and the trainer of CoCosNet v2.

SPADE (Park et al., CVPR 2019) is here: it knows the exemplar as one style code and the condition by position, and
matches nothing. CoCosNet (Zhang et al., CVPR 2020) is `CoCosNet` with `model.kind: cocosnet`, the coarsest level alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.config import Config, TranslatorConfig
from cocosnet.model.cocosnet import Output, check_inputs
from cocosnet.model.layers import LEAK, conv, instance_norm, pad_to_multiple
from cocosnet.model.translator import Translator

STYLE_SIDE = 256  # px, at most, of the exemplar that the style encoder sees (SPADE's own code: 256)
LAST_SIDE = 4  # px, of the map that becomes the code (SPADE's own code)


class Spade(nn.Module):
    """SPADE of a config's shape, called as `CoCosNet` is: out = model(condition, exemplar).

    The guide of every SPADE layer is the condition; the exemplar enters as a code that is added to the translator's
    constant. The code is the encoder's output itself: where SPADE draws one around it, this is deterministic.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        shape = config.model.translator
        self.style_encoder = StyleEncoder(min(config.data.size, STYLE_SIDE), shape)
        self.translator = Translator(config.data.condition_channels, shape)
        self.multiple = 2 ** (len(shape.widths) - 1)

    def forward(self, condition: Tensor, exemplar: Tensor, exemplar_condition: Tensor | None = None) -> Output:
        """condition B,C,H,W in [0, 1]; exemplar B,3,H',W' in [-1, 1]; exemplar_condition is checked and not used.

        Returns an Output whose lists are empty. Raises ValueError as `CoCosNet` does.
        """
        height, width = check_inputs(self.config.data.condition_channels, condition, exemplar, exemplar_condition)
        guide = pad_to_multiple(condition, self.multiple)
        image = self.translator(guide, self.style_encoder(exemplar))
        return Output(image[..., :height, :width], [], [], [], [], [])


class StyleEncoder(nn.Module):
    """Strided convolutions down to LAST_SIDE pixels a side, then one linear map to the code.

    `side`: px that the exemplar is brought to. B,3,H,W of any size in [-1, 1] -> B,widths[0],code_size,code_size.
    """

    def __init__(self, side: int, config: TranslatorConfig):
        super().__init__()
        self.depth = max((side // LAST_SIDE).bit_length() - 1, 1)
        self.code = (config.widths[0], config.code_size, config.code_size)
        widths = [3, *(min(config.widths[-1] * 2**i, config.widths[0]) for i in range(self.depth))]
        # The normalisation after each convolution removes what a bias would add.
        self.convs = nn.ModuleList(conv(a, b, stride=2, bias=False, spectral=True) for a, b in zip(widths, widths[1:]))
        self.to_code = nn.Linear(widths[-1] * LAST_SIDE**2, self.code[0] * self.code[1] * self.code[2])

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes."""
        side = LAST_SIDE * 2**self.depth
        x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        for layer in self.convs:
            x = F.leaky_relu(instance_norm(layer(x)), LEAK)
        return self.to_code(x.flatten(1)).unflatten(1, self.code)
