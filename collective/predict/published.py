"""Profiles of networks whose training was published, made from their architecture by arithmetic.

Given, with sources:

- the architectures: Inception V3 (arXiv 1512.00567, without its auxiliary head), ResNet-101 (arXiv 1512.03385), VGG-16
  (arXiv 1409.1556), at 1000 classes, as float32;
- images per second of one Pascal GPU (P100) at 64 images a batch, by TensorFlow's benchmarks of May 2017
  (tensorflow.org/performance/benchmarks): 142 for Inception V3, 154 for VGG-16. ResNet-101 is not among them. Its time
  per image is taken half way between those of ResNet-50 (219) and ResNet-152 (91.8), as its operations are;
- the scaling efficiency on 512 such GPUs, four per node, with 25 Gbit/s of RoCE: arXiv 1802.05799.

Assumed: a step without communication takes batch / images per second. Of it, forward is one third and backward two,
since backward multiplies twice for each multiplication of forward; each layer has a part of backward in proportion to
its multiplications; the update takes no time of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .profile import Gradient, Profile
from .replay import Computation

__all__ = ["PUBLISHED", "Layer", "Published", "published_profile"]

BATCH = 64
"""Images per GPU and step."""

CLASSES = 1000

_Kernel = int | tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A layer with weights: the shapes of its parameters, and the multiplications of forward for one image."""

    name: str
    shapes: Sequence[tuple[int, ...]]
    multiplications: int


class _Network:
    """Layers one after the other, and the channels and the size of the image that the last one leaves."""

    def __init__(self, size: int, norm: bool) -> None:
        self.layers: list[Layer] = []
        self.channels, self.size = 3, size
        self._norm = norm  # a batch normalisation after each convolution, in place of a bias

    def conv(self, outputs: int, kernel: _Kernel, stride: int = 1, pad: bool = True) -> None:
        """pad: so that only the stride changes the size."""
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        self.pool(max(height, width), stride, pad)
        weight = (outputs, self.channels, height, width)
        shapes = [weight, (outputs,), (outputs,)] if self._norm else [weight, (outputs,)]
        self._add("conv", shapes, self.size**2 * math.prod(weight))
        self.channels = outputs

    def pool(self, kernel: int, stride: int, pad: bool = True) -> None:
        self.size = -(-self.size // stride) if pad else (self.size - kernel) // stride + 1

    def linear(self, outputs: int) -> None:
        """From all that is left of the image."""
        inputs = self.channels * self.size**2
        self._add("linear", [(outputs, inputs), (outputs,)], inputs * outputs)
        self.channels, self.size = outputs, 1

    def branches(self, *branches: Sequence[tuple[int, ...] | tuple[int, _Kernel]], keep: int = 0) -> None:
        """Chains of convolutions that start here side by side; their channels follow each other, then `keep` more."""
        channels, size = self.channels, self.size
        outputs = keep
        for branch in branches:
            self.channels, self.size = channels, size
            for arguments in branch:
                self.conv(*arguments)
            outputs += self.channels
        self.channels = outputs

    def _add(self, kind: str, shapes: Sequence[tuple[int, ...]], multiplications: int) -> None:
        self.layers.append(Layer(f"{kind}{len(self.layers)}", shapes, multiplications))


def _vgg16() -> list[Layer]:
    net = _Network(224, norm=False)
    for convolutions, outputs in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(convolutions):
            net.conv(outputs, 3)
        net.pool(2, 2)
    for outputs in (4096, 4096, CLASSES):
        net.linear(outputs)
    return net.layers


def _resnet101() -> list[Layer]:
    net = _Network(224, norm=True)
    net.conv(64, 7, 2)
    net.pool(3, 2)
    for blocks, width in ((3, 64), (4, 128), (23, 256), (3, 512)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            chain = [(width, 1), (width, 3, stride), (4 * width, 1)]
            net.branches(chain, *([[(4 * width, 1, stride)]] if block == 0 else []))
            net.channels = 4 * width  # the branches are added up
    net.size = 1
    net.linear(CLASSES)
    return net.layers


def _inception_v3() -> list[Layer]:
    net = _Network(299, norm=True)
    net.conv(32, 3, 2, pad=False)
    net.conv(32, 3, pad=False)
    net.conv(64, 3)
    net.pool(3, 2, pad=False)
    net.conv(80, 1)
    net.conv(192, 3, pad=False)
    net.pool(3, 2, pad=False)
    for pooled in (32, 64, 64):
        net.branches([(64, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)], [(pooled, 1)])
    net.branches([(384, 3, 2, False)], [(64, 1), (96, 3), (96, 3, 2, False)], keep=net.channels)
    for width in (128, 160, 160, 192):
        twice = [(width, (7, 1)), (width, (1, 7))]
        net.branches(
            [(192, 1)],
            [(width, 1), (width, (1, 7)), (192, (7, 1))],
            [(width, 1), *twice, (width, (7, 1)), (192, (1, 7))],
            [(192, 1)],
        )
    net.branches(
        [(192, 1), (320, 3, 2, False)],
        [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, False)],
        keep=net.channels,
    )
    for _ in range(2):
        inputs = net.channels
        net.branches([(320, 1)], [(192, 1)])
        for stem in ([(384, 1)], [(448, 1), (384, 3)]):  # each ends in a fork, 1x3 and 3x1
            net.channels = inputs
            net.branches(stem)
            net.branches([(384, (1, 3))], [(384, (3, 1))])
        net.channels = 320 + 192 + 4 * 384
    net.size = 1
    net.linear(CLASSES)
    return net.layers


@dataclass(frozen=True)
class Published:
    """A network, and what has been published of its training.

    Args:
        title: its name, for people.
        layers: makes its layers, in the order of forward.
        images_per_second: of one Pascal GPU.
        is_interpolated: whether that rate is not itself published.
        efficiency: Horovod's, on 512 GPUs.
    """

    title: str
    layers: Callable[[], list[Layer]]
    images_per_second: float
    is_interpolated: bool
    efficiency: float


PUBLISHED = {
    "inception_v3": Published("Inception V3", _inception_v3, 142.0, False, 0.90),
    "resnet101": Published("ResNet-101", _resnet101, 2 / (1 / 219 + 1 / 91.8), True, 0.90),
    "vgg16": Published("VGG-16", _vgg16, 154.0, False, 0.68),
}


def published_profile(name: str) -> Profile:
    """The profile of one of PUBLISHED."""
    chosen = PUBLISHED[name]
    layers = chosen.layers()
    step = BATCH / chosen.images_per_second
    backward = 2 / 3 * step
    total = sum(layer.multiplications for layer in layers)
    gradients = []
    done = 0
    for layer in reversed(layers):
        done += layer.multiplications
        ready = backward * done / total
        for number, shape in reversed(list(enumerate(layer.shapes))):
            gradients.append(Gradient(f"{layer.name}.{number}", shape, "float32", ready))
    rate = f"{chosen.images_per_second:.0f} images/s on a P100{', interpolated' if chosen.is_interpolated else ''}"
    return Profile(chosen.title, f"{rate}, batch {BATCH}", Computation(step - backward, backward, 0.0), gradients)
