"""Inception-v3 (Szegedy and others, 2015), the network of FID, on weights that the user supplies.

Names are torchvision's. The number of classes tells two sets of weights apart: 1008 are those of
the TensorFlow graph that FID is defined by, whose averages leave out the padding, whose last block
takes a maximum and whose pictures become (x - 128) / 128; 1000 are torchvision's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UserError
from ..store import check_expected, load_npz, load_tensors
from ..store.files import damaged, one_line, open_for_reading

SIDE = 299  # pixels of the pictures that the network reads
POOLED = 2048
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17  # of the map that the spatial distance takes
TENSORFLOW_CLASSES = 1008
BN_EPSILON = 0.001
BN_NAMES = ("weight", "bias", "running_mean", "running_var")
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


class Convolution(nn.Conv2d):
    """A convolution with its batch norm folded in, then ReLU."""

    def __call__(self, x: mx.array) -> mx.array:
        return nn.relu(super().__call__(x))


def convolution(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    *,
    stride: int = 1,
    padded: bool = True,
) -> Convolution:
    """One that keeps the map's size, unless it has a stride or is not padded."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    keeps = padded and stride == 1
    padding = (height // 2, width // 2) if keeps else 0
    return Convolution(inputs, outputs, (height, width), stride, padding)


def average(x: mx.array, whole: bool) -> mx.array:
    """3x3 means of a padded map: of the `whole` window, or of what lies inside of the map."""
    means = nn.AvgPool2d(3, 1, 1)
    if whole:
        return means(x)
    return means(x) / means(mx.ones((1, *x.shape[1:3], 1)))


def halved(x: mx.array) -> mx.array:
    return nn.MaxPool2d(3, 2)(x)


class BlockA(nn.Module):
    """35x35, 64 + 64 + 96 + `pooled` channels."""

    def __init__(self, inputs: int, pooled: int, whole: bool):
        super().__init__()
        self.branch1x1 = convolution(inputs, 64, 1)
        self.branch5x5_1 = convolution(inputs, 48, 1)
        self.branch5x5_2 = convolution(48, 64, 5)
        self.branch3x3dbl_1 = convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = convolution(64, 96, 3)
        self.branch3x3dbl_3 = convolution(96, 96, 3)
        self.branch_pool = convolution(inputs, pooled, 1)
        self._whole = whole

    def __call__(self, x: mx.array) -> mx.array:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pool = self.branch_pool(average(x, self._whole))
        return mx.concatenate([self.branch1x1(x), five, three, pool], axis=-1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = convolution(64, 96, 3)
        self.branch3x3dbl_3 = convolution(96, 96, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return mx.concatenate([self.branch3x3(x), double, halved(x)], axis=-1)


class BlockC(nn.Module):
    """17x17, 7x7 convolutions as rows and columns of `inner` channels."""

    def __init__(self, inner: int, whole: bool):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = convolution(768, 192, 1)
        self.branch7x7_1 = convolution(768, inner, 1)
        self.branch7x7_2 = convolution(inner, inner, row)
        self.branch7x7_3 = convolution(inner, 192, column)
        self.branch7x7dbl_1 = convolution(768, inner, 1)
        self.branch7x7dbl_2 = convolution(inner, inner, column)
        self.branch7x7dbl_3 = convolution(inner, inner, row)
        self.branch7x7dbl_4 = convolution(inner, inner, column)
        self.branch7x7dbl_5 = convolution(inner, 192, row)
        self.branch_pool = convolution(768, 192, 1)
        self._whole = whole

    def __call__(self, x: mx.array) -> mx.array:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(self.branch7x7dbl_3(double)))
        pool = self.branch_pool(average(x, self._whole))
        return mx.concatenate([self.branch1x1(x), seven, double, pool], axis=-1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = convolution(768, 192, 1)
        self.branch3x3_2 = convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = convolution(768, 192, 1)
        self.branch7x7x3_2 = convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = convolution(192, 192, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return mx.concatenate([three, self.branch7x7x3_4(seven), halved(x)], axis=-1)


class BlockE(nn.Module):
    """8x8, 2048 channels; `pool` is "whole", "inside" or "largest"."""

    def __init__(self, inputs: int, pool: str):
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.branch1x1 = convolution(inputs, 320, 1)
        self.branch3x3_1 = convolution(inputs, 384, 1)
        self.branch3x3_2a = convolution(384, 384, row)
        self.branch3x3_2b = convolution(384, 384, column)
        self.branch3x3dbl_1 = convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = convolution(448, 384, 3)
        self.branch3x3dbl_3a = convolution(384, 384, row)
        self.branch3x3dbl_3b = convolution(384, 384, column)
        self.branch_pool = convolution(inputs, 192, 1)
        self._pool = pool

    def __call__(self, x: mx.array) -> mx.array:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        largest = self._pool == "largest"
        pool = nn.MaxPool2d(3, 1, 1)(x) if largest else average(x, self._pool == "whole")
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pool),
        ]
        return mx.concatenate(branches, axis=-1)


@dataclass(frozen=True)
class Activations:
    """What is read of the network, a row a picture."""

    pooled: mx.array  # (n, 2048) means of the last map: "pool3"
    spatial: mx.array  # (n, 17·17·7) of 299x299: "mixed_6/conv", the first channels, by place
    logits: mx.array  # (n, classes)


class InceptionV3(nn.Module):
    """Pictures (n, height, width, 3) from 0 to 255, of any size, to activations."""

    def __init__(self, classes: int = TENSORFLOW_CLASSES):
        super().__init__()
        tensorflow = classes == TENSORFLOW_CLASSES
        whole = not tensorflow
        self.Conv2d_1a_3x3 = convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = convolution(80, 192, 3, padded=False)
        self.Mixed_5b = BlockA(192, 32, whole)
        self.Mixed_5c = BlockA(256, 64, whole)
        self.Mixed_5d = BlockA(288, 64, whole)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128, whole)
        self.Mixed_6c = BlockC(160, whole)
        self.Mixed_6d = BlockC(160, whole)
        self.Mixed_6e = BlockC(192, whole)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, "inside" if tensorflow else "whole")
        self.Mixed_7c = BlockE(POOLED, "largest" if tensorflow else "whole")
        self.fc = nn.Linear(POOLED, classes)
        self._middle = 128.0 if tensorflow else 127.5  # of the values 0 to 255
        self._biased = not tensorflow

    def __call__(self, pictures: mx.array) -> Activations:
        resized = resize(pictures.astype(mx.float32), SIDE)
        return self.activations(resized / self._middle - 1)

    def activations(self, x: mx.array) -> Activations:
        """Of pictures from -1 to 1, of the size that they have."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halved(x))))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        middle = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        x = self.Mixed_7a(self.Mixed_6e(middle))
        pooled = self.Mixed_7c(self.Mixed_7b(x)).mean(axis=(1, 2))
        # Mixed_6d begins with its 1x1 branch, which is the layer that the spatial distance reads.
        spatial = middle[..., :SPATIAL_CHANNELS].reshape(len(middle), -1)
        # The score of TensorFlow's network has always been computed without the last bias.
        logits = pooled @ self.fc.weight.T + (self.fc.bias if self._biased else 0)
        return Activations(pooled, spatial, logits)


def resize(x: mx.array, side: int) -> mx.array:
    """To side x side as TensorFlow's first bilinear resize did: pixel i at i times the ratio of
    the sizes, between its two neighbours, without smoothing."""
    for axis in (1, 2):
        length = x.shape[axis]
        place = np.arange(side) * (length / side)
        lower = np.floor(place).astype(np.int32)
        upper = np.minimum(lower + 1, length - 1)
        share = mx.array((place - lower).astype(np.float32))
        share = share.reshape([-1 if a == axis else 1 for a in range(4)])
        low, high = (mx.take(x, mx.array(index), axis=axis) for index in (lower, upper))
        x = low + (high - low) * share
    return x


def load_inception(path: str | Path) -> InceptionV3:
    """The network on the weights in a file with torchvision's names."""
    path = Path(path)
    weights = read_weights(path)
    if "fc.weight" not in weights or weights["fc.weight"].ndim != 2:
        raise UserError(
            f"{path} has no fc.weight of two dimensions; give an Inception-v3 with torchvision's "
            "names (Conv2d_1a_3x3.conv.weight, …, fc.weight)"
        )
    model = InceptionV3(len(weights["fc.weight"]))
    found = {name: (w.dtype.name, w.shape) for name, w in weights.items()}
    check_expected(path, found, expected(model), allow_extra=True)
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise UserError(f"{path}: {name} is not finite everywhere; download the file again")
    model.load_weights(list(folded(model, weights).items()))
    model.eval()
    return model


def convolutions(model: InceptionV3) -> dict[str, Convolution]:
    return {p: m for p, m in model.named_modules() if isinstance(m, Convolution)}


def expected(model: InceptionV3) -> dict[str, tuple[None, tuple[int, ...]]]:
    """Shapes by name of what a file holds; of aux classifiers and counters nothing is read."""
    wanted = {"fc.weight": (None, model.fc.weight.shape), "fc.bias": (None, model.fc.bias.shape)}
    for path, layer in convolutions(model).items():
        rows, height, width, columns = layer.weight.shape
        wanted[f"{path}.conv.weight"] = (None, (rows, columns, height, width))
        wanted |= {f"{path}.bn.{name}": (None, (rows,)) for name in BN_NAMES}
    return wanted


def folded(model: InceptionV3, weights: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
    """Our parameters: batch norms as part of the convolutions before them."""
    ours = {name: mx.array(weights[name]) for name in ("fc.weight", "fc.bias")}
    for path in convolutions(model):
        gain, bias, mean, variance = (
            weights[f"{path}.bn.{name}"].astype(np.float64) for name in BN_NAMES
        )
        gain = gain / np.sqrt(variance + BN_EPSILON)
        kernel = weights[f"{path}.conv.weight"].transpose(0, 2, 3, 1) * gain[:, None, None, None]
        ours[f"{path}.weight"] = mx.array(kernel.astype(np.float32))
        ours[f"{path}.bias"] = mx.array((bias - mean * gain).astype(np.float32))
    return ours


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """All float arrays of the file, in float32."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no file of weights that is read here; valid endings: {', '.join(SUFFIXES)}"
        )
    if suffix == ".safetensors":
        tensors = load_tensors(path)
        return {n: np.array(t.astype(mx.float32)) for n, t in tensors.items() if is_float(t)}
    arrays = load_npz(path) if suffix == ".npz" else read_torch(path)
    return {n: a.astype(np.float32) for n, a in arrays.items() if a.dtype.kind == "f"}


def is_float(tensor: mx.array) -> bool:
    return mx.issubdtype(tensor.dtype, mx.floating)


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """A state dict of PyTorch's, which may hold tensors and nothing else."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a file of PyTorch, which is not installed here; install it, or save the "
            "weights as .safetensors where it is"
        ) from None
    with open_for_reading(path):
        pass
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {str(name): tensor for name, tensor in state.items()}
        return {
            name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()
        }
    except Exception as error:  # an unpickler of foreign bytes raises whatever it likes
        raise damaged(path, f"no state dict that PyTorch reads ({one_line(error)})") from error
