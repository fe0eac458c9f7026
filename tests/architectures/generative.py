"""Networks whose output is an image made from a code, from another image, or from noise."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Attention, ConvNorm
from .entry import IMAGE_SIZE, Architecture, Inputs, images, series


class Autoencoder(nn.Module):
    """Strided convolutions down to a vector, transposed convolutions back to the image."""

    def __init__(self, latent: int = 16):
        super().__init__()
        down = [nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1)]
        down += [nn.BatchNorm2d(32), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(2048, latent)]
        up = [nn.Linear(latent, 2048), nn.ReLU(), nn.Unflatten(1, (32, 8, 8))]
        up += [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
        up += [nn.ConvTranspose2d(16, 3, 3, 2, 1, output_padding=1), nn.Sigmoid()]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class VariationalAutoencoder(nn.Module):
    """Samples its code while training, and takes the code's mean otherwise."""

    def __init__(self, latent: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(ConvNorm(1, 8, 3, 2), ConvNorm(8, 16, 3, 2), nn.Flatten())
        self.mean = nn.Linear(16 * 16, latent)
        self.log_variance = nn.Linear(16 * 16, latent)
        grow = [nn.Linear(latent, 16 * 16), nn.ReLU(), nn.Unflatten(1, (16, 4, 4))]
        grow += [nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2)]
        self.decoder = nn.Sequential(*grow)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean
        if self.training:
            code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code), mean, log_variance


def generator(width: int = 16) -> nn.Module:
    """DCGAN's generator: transposed convolutions from a 1x1 image of noise to one of 32x32."""
    layers = [nn.ConvTranspose2d(24, 4 * width, 4, 1, 0, bias=False), nn.BatchNorm2d(4 * width)]
    for inputs, outputs in ((4 * width, 2 * width), (2 * width, width)):
        up = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
        layers += [nn.ReLU(True), up, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())


def style_transfer(width: int = 12) -> nn.Module:
    """Fast style transfer: reflection padding, instance norm, residual blocks, upsampling."""

    def layer(inputs, outputs, kernel, stride=1):
        norm = nn.InstanceNorm2d(outputs, affine=True)
        pad = nn.ReflectionPad2d(kernel // 2)
        return nn.Sequential(pad, nn.Conv2d(inputs, outputs, kernel, stride), norm, nn.ReLU())

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                layer(2 * width, 2 * width, 3), layer(2 * width, 2 * width, 3)
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x)

    down = [layer(3, width, 9), layer(width, 2 * width, 3, 2)]
    up = [nn.Upsample(scale_factor=2), layer(2 * width, width, 3)]
    last = [nn.ReflectionPad2d(4), nn.Conv2d(width, 3, 9)]
    return nn.Sequential(*down, Residual(), Residual(), *up, *last)


class TimedResidual(nn.Module):
    """Two convolutions with group norm and SiLU, the time embedding added between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        out = self.conv2(F.dropout(F.silu(self.norm2(out)), 0.1, self.training))
        return out + self.shortcut(x)


class Diffusion(nn.Module):
    """The denoiser of a diffusion model: a U-Net told the time, with attention in the middle."""

    def __init__(self, width: int = 16, embedding: int = 32):
        super().__init__()
        self.embedding = embedding
        self.time = nn.Sequential(
            nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = TimedResidual(width, width, embedding)
        self.shrink = nn.Conv2d(width, width, 3, 2, 1)
        self.down2 = TimedResidual(width, 2 * width, embedding)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.attention = Attention(2 * width, heads=2)
        self.up2 = TimedResidual(4 * width, 2 * width, embedding)
        self.grow = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up1 = TimedResidual(3 * width, width, embedding)
        self.leave = nn.Sequential(
            nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)
        )

    def waves(self, time: Tensor) -> Tensor:
        """Cosines and sines of several frequencies of the time, (B,) to (B, embedding)."""
        half = self.embedding // 2
        frequencies = torch.exp(-math.log(1e4) * torch.arange(half, device=time.device) / half)
        angles = time[:, None] * frequencies[None, :]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over the pixels, (B, C, H, W) kept."""
        rows = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        return x + self.attention(rows).transpose(1, 2).reshape(x.shape)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        time = self.time(self.waves(time))
        first = self.down1(self.enter(image), time)
        second = self.down2(self.shrink(first), time)
        x = self.up2(torch.cat([self.attend(second), second], 1), time)
        x = self.grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.leave(self.up1(torch.cat([x, first], 1), time))


def noisy_images() -> Inputs:
    """An image and the time of its noise, by keyword."""
    return {"image": torch.randn(2, 3, 16, 16), "time": 1000 * torch.rand(2)}


ENTRIES = {
    "autoencoder": Architecture(build=Autoencoder, example=images(), family="generative"),
    "vae": Architecture(
        build=VariationalAutoencoder, example=images(16, channels=1), family="generative"
    ),
    "dcgan": Architecture(build=generator, example=series(24, 1, 1), family="generative"),
    "style_transfer": Architecture(
        build=style_transfer, example=images(), family="generative", dynamic=IMAGE_SIZE
    ),
    "diffusion": Architecture(build=Diffusion, example=noisy_images, family="generative"),
}
