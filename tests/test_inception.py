"""Inception-v3 against another one, in NumPy and torchvision's own; its files of weights."""

from __future__ import annotations

from pathlib import Path

from src.errors import UserError
from src.models.inception import SIDE, InceptionV3, folded, load_inception, resize
from src.store import save_npz, save_tensors

import mlx.core as mx
import numpy as np
import pytest

from . import inception_reference as reference
from .helpers import relative_error

SMALL = 107  # pixels; the smallest that all blocks can halve is 75


def loaded(weights: dict[str, np.ndarray]) -> InceptionV3:
    model = InceptionV3(len(weights["fc.weight"]))
    model.load_weights(list(folded(model, weights).items()))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1008, 1000], ids=["tensorflow", "torchvision"])
def test_equals_a_plain_inception_on_random_weights(classes):
    weights = reference.random_weights(classes)
    x = np.random.default_rng(1).uniform(-1, 1, (2, SMALL, SMALL, 3)).astype(np.float32)
    found = loaded(weights).activations(mx.array(x))
    pooled, middle, logits = reference.run(x, weights)
    assert np.linalg.norm(pooled[0] - pooled[1]) > 1e-3 * np.linalg.norm(pooled[0])
    assert relative_error(found.pooled, pooled) < 1e-5
    assert relative_error(found.spatial, middle[..., :7].reshape(2, -1)) < 1e-5
    assert relative_error(found.logits, logits + (classes == 1000) * weights["fc.bias"]) < 1e-5


@pytest.mark.slow
@pytest.mark.sd3
def test_equals_torchvision_on_random_weights():
    torch = pytest.importorskip("torch")
    try:
        from torchvision.models import inception_v3
    except (ImportError, RuntimeError) as error:  # the latter where it is for another PyTorch
        pytest.skip(f"no usable torchvision: {error}")
    weights = reference.random_weights(1000)
    theirs = inception_v3(weights=None, init_weights=False, aux_logits=False).eval()
    theirs.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, strict=False)
    kept: dict[str, torch.Tensor] = {}
    theirs.avgpool.register_forward_hook(lambda m, i, out: kept.update(pooled=out.flatten(1)))
    x = np.random.default_rng(2).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    found = loaded(weights).activations(mx.array(x))
    assert relative_error(found.pooled, kept["pooled"]) < 1e-5
    assert relative_error(found.logits, logits) < 1e-5


@pytest.mark.parametrize("shape", [(2, 3), (SIDE, SIDE), (1024, 7)])
def test_resizing_is_tensorflows_first_one(shape):
    """Pixel i lies at i times the ratio of the sizes, and beyond the last one nothing changes."""
    x = np.random.default_rng(0).uniform(0, 255, (1, *shape, 3)).astype(np.float32)
    wanted = x
    for axis, length in ((1, shape[0]), (2, shape[1])):
        place = np.minimum(np.arange(SIDE) * length / SIDE, length - 1)
        wanted = np.apply_along_axis(
            lambda line, place=place: np.interp(place, np.arange(len(line)), line), axis, wanted
        )
    np.testing.assert_allclose(np.array(resize(mx.array(x), SIDE)), wanted, atol=1e-2)


@pytest.mark.slow
def test_all_kinds_of_files_give_the_same(tmp_path: Path):
    """Aux classifiers and counters, which torchvision's file has too, do not matter."""
    weights = reference.random_weights(1008)
    extra = {"AuxLogits.fc.bias": np.zeros(3, np.float32), "x.num_batches_tracked": np.array(5)}
    save_npz(tmp_path / "w.npz", **weights, **extra)
    save_tensors(tmp_path / "w.safetensors", {**weights, **extra})
    paths = [tmp_path / "w.npz", tmp_path / "w.safetensors"]
    try:
        import torch
    except ImportError:
        torch = None
    if torch is not None:
        arrays = {**weights, **extra}
        torch.save({n: torch.tensor(a) for n, a in arrays.items()}, tmp_path / "w.pt")
        paths.append(tmp_path / "w.pt")
    picture = mx.array(np.random.default_rng(3).integers(0, 256, (1, 64, 48, 3), np.uint8))
    found = [load_inception(path)(picture) for path in paths]
    assert found[0].spatial.shape == (1, 2023) and found[0].pooled.shape == (1, 2048)
    for other in found[1:]:
        assert mx.array_equal(other.pooled, found[0].pooled)
    weights["Mixed_6c.branch1x1.bn.bias"][3] = np.nan
    save_npz(tmp_path / "nan.npz", **weights)
    with pytest.raises(UserError, match="Mixed_6c.branch1x1.bn.bias is not finite"):
        load_inception(tmp_path / "nan.npz")
    del weights["Mixed_6c.branch1x1.bn.bias"]
    save_npz(tmp_path / "lacking.npz", **weights)
    with pytest.raises(UserError, match="has no array 'Mixed_6c.branch1x1.bn.bias'"):
        load_inception(tmp_path / "lacking.npz")


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"valid endings: \.safetensors, \.npz, \.pt, \.pth"):
        load_inception(tmp_path / "weights.h5")
    with pytest.raises(UserError, match="is missing"):
        load_inception(tmp_path / "absent.safetensors")
    save_npz(tmp_path / "other.npz", a=np.zeros(3, np.float32))
    with pytest.raises(UserError, match="no fc.weight"):
        load_inception(tmp_path / "other.npz")
