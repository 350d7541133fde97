"""Encoders: how an observation becomes the features that the policy and the value function see."""

import gymnasium as gym
import torch
from torch import Tensor, nn

from rl.spaces import IMAGE_FEATURES, Image, Vector, has_channels_last, observation_parts


class Encoder(nn.Module):
    """Features of observations: vectors as they are, images through a small convolutional network, side by side.

    Args:
        observation_space: as the environment declares it.
        activation: of the convolutional network.
    """

    def __init__(self, observation_space: gym.Space, activation: type[nn.Module]) -> None:
        super().__init__()
        self.parts = observation_parts(observation_space)
        self.images = nn.ModuleList(ImageEncoder(part, activation) for part in self.parts if isinstance(part, Image))
        self.num_features = sum(IMAGE_FEATURES if isinstance(part, Image) else part.size for part in self.parts)

    def forward(self, observations: Tensor) -> Tensor:
        """Return features float32 [..., F] for observations [..., *shape] as they are stored."""
        if not self.images:
            return observations
        if len(self.parts) == 1:
            return self.images[0](observations)
        images = iter(self.images)
        pieces = observations.split([part.size for part in self.parts], -1)
        return torch.cat(
            [
                piece if isinstance(part, Vector) else next(images)(piece.unflatten(-1, part.shape))
                for part, piece in zip(self.parts, pieces, strict=True)
            ],
            -1,
        )


SMALLEST_FOR_THREE = 36  # pixels; of smaller images the three convolutions leave nothing


class ImageEncoder(nn.Module):
    """A convolutional network, then a layer of IMAGE_FEATURES units.

    The convolutions are those of Mnih et al. 2015, "Human-level control through deep reinforcement learning", and of
    small images the one of Young & Tian 2019, "MinAtar".
    """

    def __init__(self, image: Image, activation: type[nn.Module]) -> None:
        super().__init__()
        self.image = image
        channels, height, width = self.to_channels_first(torch.zeros(1, *image.shape)).shape[1:]
        if min(height, width) < SMALLEST_FOR_THREE:
            layers = [nn.Conv2d(channels, 16, 3)]
        else:
            layers = [nn.Conv2d(channels, 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3)]
        convolutions = nn.Sequential(*(part for layer in layers for part in (layer, activation())), nn.Flatten())
        num_outputs = convolutions(torch.zeros(1, channels, height, width)).shape[1]
        self.network = nn.Sequential(*convolutions, nn.Linear(num_outputs, IMAGE_FEATURES), activation())

    def to_channels_first(self, images: Tensor) -> Tensor:
        """Return images [B, C, H, W], whatever axis the channels are on."""
        if images.dim() == 3:
            return images.unsqueeze(1)
        return images.permute(0, 3, 1, 2) if has_channels_last(self.image.shape) else images

    def forward(self, images: Tensor) -> Tensor:
        """Return features float32 [..., IMAGE_FEATURES] for images [..., *shape], their values mapped to 0..1."""
        leading = images.shape[: images.dim() - len(self.image.shape)]
        flat = images.reshape(-1, *self.image.shape).float()
        scaled = (self.to_channels_first(flat) - self.image.low) / (self.image.high - self.image.low)
        return self.network(scaled).reshape(*leading, IMAGE_FEATURES)
