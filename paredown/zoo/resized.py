"""Images at another size than they come in."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Resized(nn.Module):
    """A net of images behind a resizing; maps are resized back.

    Shapes: (B, C, H, W) -> what the net gives of (B, C, *size), maps as (B, classes, H, W).
    """

    def __init__(self, net: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor) -> Tensor:
        made = self.net(F.interpolate(x, size=self.size, mode="bilinear", align_corners=False))
        if made.dim() == 4:
            return F.interpolate(made, size=x.shape[2:], mode="bilinear", align_corners=False)
        return made  # type: ignore[no-any-return]
