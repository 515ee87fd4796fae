"""A highway network: its layers mix their input with something new, g f(x) + (1 - g) x, and show no residual addition.

dbconvert inspect examples/highway.py works because of adapter() below; without it the network is refused.
"""

import torch
from torch import nn

from dbconvert import Adapter


class Highway(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.change, self.share = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        share = torch.sigmoid(self.share(x))
        return share * torch.relu(self.change(x)) + (1 - share) * x


class Network(nn.Module):
    def __init__(self, inputs=64, width=96, depth=6, classes=10):
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(Highway(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, image):
        x = self.stem(image.flatten(1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build_model():
    return Network()


def example_inputs():
    return torch.randn(2, 1, 8, 8)


def adapter():
    """Where the layers are, what enters them, what leaves them."""
    return Adapter(layers=("layers",), enters=(0,), leaves=())
