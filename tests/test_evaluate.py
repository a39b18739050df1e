"""Evaluation: the figures against their formulas, folders and models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

from src.errors import UserError
from src.evaluate import evaluate
from src.evaluation.accuracy import verdicts_of
from src.evaluation.networks import Features, Identity, ScorerNetwork
from src.evaluation.sources import Folder, is_model, open_folder
from src.evaluation.statistics import Known, Statistics, load_statistics
from src.evaluation.work import Settings, prepare
from src.metrics.fidelity import bootstrap_interval
from src.metrics.inception_score import InceptionScore
from src.metrics.psnr import psnr
from src.metrics.ssim import ssim
from src.models.load import ModelChoice
from src.models.nano.captions import captions, parse
from src.models.nano.judge import judge
from src.models.nano.render import render
from src.models.nano.scenes import sample_scenes
from src.quant.int8_operators import BACKEND_NAMES
from src.report.picture import write_picture
from src.store import save_npz

import mlx.core as mx
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from .helpers import assert_one_error_line, run_here

COUNT = 200  # pictures, more than the scorer's 192 features


def write_pictures(folder: Path, pictures: np.ndarray) -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:03d}.png")
    return folder


def scenes(count: int, seed: int) -> np.ndarray:
    pictures = np.array(render(sample_scenes(np.random.default_rng(seed), count)))
    return np.round(255 * pictures).astype(np.uint8)


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return scenes(8, 0)


def probabilities(seed: int, count: int, classes: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(classes, 0.2), count)


def random_features(seed: int, count: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(3, 1, (count, size)) @ rng.normal(0, 0.3, (size, size))


def streamed(count: int, size: int, seed: int, splits: int = 5) -> tuple[Statistics, Features]:
    """Statistics of random features in uneven batches, and all of them at once."""
    parts = [random_features(seed + i, count, size) for i in range(2)]
    every = Features(*parts, probabilities(seed, count, 10))
    statistics = Statistics(Identity("a test", "00" * 32, size, size, 10), splits)
    for start in range(0, count, 7):
        rows = slice(start, start + 7)
        some = Features(every.pooled[rows], every.spatial[rows], every.probabilities[rows])
        statistics.add(some, [str(i) for i in range(start, start + 7)])
    return statistics, every


def matrix_root_distance(one: np.ndarray, two: np.ndarray) -> float:
    """The textbook's formula on features."""
    first, second = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    apart = np.sum((one.mean(axis=0) - two.mean(axis=0)) ** 2)
    return float(apart + np.trace(first + second - 2 * root))


@pytest.mark.parametrize("size", [8, 64])
def test_one_pass_gives_scipys_distances(size):
    (one, first), (two, second) = (streamed(150, size, seed) for seed in (0, 5))
    for kind in ("pooled", "spatial"):
        wanted = matrix_root_distance(getattr(first, kind), getattr(second, kind))
        means, covariances = getattr(one.known, kind).parts(getattr(two.known, kind))
        assert means + covariances == pytest.approx(wanted, rel=1e-4)
        assert getattr(one, kind).distance(getattr(two, kind)) == means + covariances


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 5), st.integers(2, 12))
def test_inception_score_is_its_formula_in_every_part(seed, splits, each, classes):
    p = probabilities(seed, splits * each + seed % splits, classes)
    score = InceptionScore(splits)
    for start in range(0, len(p), 3):
        score.add(p[start : start + 3])
    wanted = []
    for part in (p[i::splits] for i in range(splits)):
        safe = np.maximum(part, 1e-300)
        divergence = part * (np.log(safe) - np.log(np.maximum(part.mean(axis=0), 1e-300)))
        wanted.append(np.exp(divergence.sum(axis=1).mean()))
    np.testing.assert_allclose(score.scores, wanted, rtol=1e-9)
    assert np.all(score.scores > 1 - 1e-9) and np.all(score.scores < classes + 1e-9)


def test_inception_score_goes_from_one_to_the_number_of_classes():
    blind, perfect = InceptionScore(1), InceptionScore(1)
    blind.add(np.full((20, 4), 0.25))
    perfect.add(np.eye(4)[np.arange(20) % 4])
    assert blind.mean == pytest.approx(1) and perfect.mean == pytest.approx(4)
    assert perfect.deviation is None
    with pytest.raises(UserError, match="3 splits need"):
        few = InceptionScore(3)
        few.add(np.eye(2))
        _ = few.scores


@pytest.mark.sd3
@pytest.mark.slow
def test_equals_torchmetrics():
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")
    inception = pytest.importorskip("torchmetrics.image.inception")

    class AsGiven(torch.nn.Module):
        num_features = 48

        def forward(self, features):
            return features

    (one, first), (two, second) = (streamed(300, 48, seed) for seed in (0, 5))
    for kind in ("pooled", "spatial"):
        theirs = fid.FrechetInceptionDistance(feature=AsGiven()).set_dtype(torch.float64)
        theirs.update(torch.from_numpy(getattr(first, kind)), real=True)
        theirs.update(torch.from_numpy(getattr(second, kind)), real=False)
        ours = getattr(one, kind).distance(getattr(two, kind))
        assert ours == pytest.approx(float(theirs.compute()), rel=1e-4)
    theirs = inception.InceptionScore(feature=AsGiven(), splits=5)
    theirs.update(torch.log(torch.from_numpy(first.probabilities)))
    torch.manual_seed(0)
    mean, deviation = theirs.compute()
    # It shuffles and then cuts; dealing its order out in turn gives the same parts.
    torch.manual_seed(0)
    order = torch.randperm(300).numpy().reshape(5, 60).T.ravel()
    score = InceptionScore(5)
    score.add(first.probabilities[order])
    assert score.mean == pytest.approx(float(mean), rel=1e-4)
    assert score.deviation == pytest.approx(float(deviation), rel=1e-3)


def test_saved_statistics_come_back(tmp_path):
    statistics, _ = streamed(100, 6, 0)
    known = load_statistics(statistics.save(tmp_path / "s.npz"), statistics.identity)
    assert known.count == 100
    assert known.pooled.distance(statistics.pooled.moments) == pytest.approx(0, abs=1e-9)
    assert known.spatial.distance(statistics.spatial.moments) == pytest.approx(0, abs=1e-9)
    other = Identity("another", "11" * 32, 6, 6, 10)
    with pytest.raises(UserError, match="is of network 0000000000000000"):
        load_statistics(tmp_path / "s.npz", other)


def test_statistics_of_other_tools_are_read_and_unsound_ones_refused(tmp_path):
    identity, path = Identity("a test", "00" * 32, 3, 3, 10), tmp_path / "s.npz"
    save_npz(path, mu=np.zeros(3), sigma=np.eye(3))
    known = load_statistics(path, identity)
    assert known.spatial is None and known.count is None
    wrong = {
        "expected .3,.": {"mu": np.zeros(4), "sigma": np.eye(4)},
        "no array 'sigma'": {"mu": np.zeros(3)},
        "mu is not finite": {"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)},
        "not symmetric": {"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))},
        "negative variances": {"mu": np.zeros(3), "sigma": np.diag([1.0, 1.0, -0.1])},
        "undefined": {"mu": np.zeros(3), "sigma": np.eye(3), "count": np.array(3)},
        "no whole number": {"mu": np.zeros(3), "sigma": np.eye(3), "count": np.array(-5)},
    }
    for message, arrays in wrong.items():
        save_npz(path, **arrays)
        with pytest.raises(UserError, match=message):
            load_statistics(path, identity)


def test_features_that_are_not_finite_name_their_picture():
    statistics, every = streamed(10, 4, 0)
    every.spatial[7, 1] = np.nan
    with pytest.raises(UserError, match="a test gives features of picture 7 that are not finite"):
        statistics.add(every, [f"picture {i}" for i in range(10)])


def test_the_scorer_gives_probabilities_of_what_is_seen(drawn):
    found = ScorerNetwork()(drawn)
    assert found.pooled.shape == found.spatial.shape == (8, 192)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert found.probabilities.shape == (8, 90) and found.probabilities.max(axis=1).min() > 0.9
    network = ScorerNetwork()
    scorer, shown = network.scorer, mx.array(drawn) / 255
    np.testing.assert_allclose(found.pooled, np.array(scorer.features(shown)), atol=1e-5)
    np.testing.assert_allclose(found.spatial, np.array(scorer.spatial_features(shown)), atol=1e-5)


def test_an_interval_can_be_that_of_the_median():
    values = np.r_[np.arange(99.0), 1e6]
    low, high = bootstrap_interval(values, of=np.median)
    assert 30 < low < 50 < high < 70 < bootstrap_interval(values)[1]


@pytest.mark.slow
def test_a_few_pairs_in_folders(tmp_path, drawn):
    """PSNR and SSIM pair by pair, without FID, for which there are too few."""
    noise = np.random.default_rng(0).integers(-9, 10, drawn.shape)
    changed = np.clip(drawn + noise, 0, 255).astype(np.uint8)
    changed[3] = drawn[3]
    folders = [write_pictures(tmp_path / n, p) for n, p in (("a", changed), ("b", drawn))]
    arguments = ["--pictures", "a", "--against", "b", "--no-fid", "--batch-size", "3"]
    result = run_here("src.evaluate", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "median PSNR" in result.stdout and "FID" not in result.stdout
    assert "Inception Score —" in result.stdout
    assert "no Inception Score of 8 pictures" in result.stderr
    data = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    for index, row in enumerate(data["paired"]["pictures"]):
        assert row["name"] == f"{index:03d}.png"
        wanted = psnr(drawn[index], changed[index])
        assert row["psnr"] == (None if index == 3 else pytest.approx(wanted))
        assert row["ssim"] == pytest.approx(ssim(drawn[index], changed[index]))
    paired = data["paired"]
    assert paired["count"] == 8 and paired["equal"] == 1 and "fid" not in data
    figures = paired["figures"]["ssim"]
    low, high = figures["median_interval"]
    assert figures["worst"] <= low <= figures["median"] <= high
    assert data["inception_score"]["mean"] is None and "accuracy" not in data
    page = (tmp_path / "evaluation" / "evaluation.md").read_text()
    assert "| Inception Score | — |" in page
    for name in ("pairs.png", "pictures.png"):
        assert name in page and Image.open(tmp_path / "evaluation" / name).width > 300
    again = run_here("src.evaluate", *arguments, cwd=tmp_path)
    assert_one_error_line(again, "evaluation.json is there already", "--force")
    assert [f.name for f in folders] == ["a", "b"]


@pytest.mark.slow
def test_sets_in_folders_and_their_statistics(tmp_path):
    """FID and sFID are those of the features; the saved statistics give the same."""
    one, two = scenes(COUNT, 1), scenes(COUNT + 9, 2)
    paths = [write_pictures(tmp_path / n, p) for n, p in (("a", one), ("b", two))]
    saved = tmp_path / "s.npz"
    found = evaluate(paths[0], tmp_path / "x", against=paths[1], save_statistics=saved)
    network = ScorerNetwork()
    first, second = network(one), network(two)
    assert found["fid"]["value"] == pytest.approx(
        matrix_root_distance(first.pooled.astype(float), second.pooled.astype(float)), rel=1e-4
    )
    assert found["sfid"]["value"] == pytest.approx(
        matrix_root_distance(first.spatial.astype(float), second.spatial.astype(float)), rel=1e-4
    )
    assert "paired" not in found and "names differ, as 200.png" in found["notes"][0]
    assert "here 200 are compared with 209" in found["notes"][1]
    assert found["against_inception_score"]["splits"] == 10
    again = evaluate(paths[1], tmp_path / "z", against=saved, batch_size=64)
    assert again["fid"]["value"] == pytest.approx(found["fid"]["value"], rel=1e-4)
    assert again["sfid"]["value"] == pytest.approx(found["sfid"]["value"], rel=1e-4)
    score = again["inception_score"]["mean"]
    assert score == pytest.approx(found["against_inception_score"]["mean"])
    assert (tmp_path / "z" / "features.png").exists()


def notes_of(count: int, against: Folder | Known | None = None, **settings) -> list[str]:
    settings = Settings(paired=False, **settings)
    return prepare(folder_of(count), against, ScorerNetwork(), settings, False).notes


def folder_of(count: int) -> Folder:
    return Folder(Path("a"), [f"{i}.png" for i in range(count)], (128, 128))


@pytest.mark.parametrize(
    ("count", "splits", "words"),
    [
        (1, None, "no Inception Score of 1 pictures"),
        (19, None, "no Inception Score of 19 pictures: with 10 parts"),
        (20, None, "the Inception Score of 20 pictures in 10 parts is held down"),
        (899, None, "than the network has classes, 90"),
        (900, None, None),
        (5, 3, "no Inception Score of 5 pictures: with 3 parts"),
        (90, 1, None),
    ],
)
def test_a_score_of_few_pictures_is_none_or_has_a_note(count, splits, words):
    notes = notes_of(count, folder_of(count), fid=False, splits=splits)
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


def test_distances_of_different_or_unknown_numbers_have_a_note():
    known = streamed(900, 4, 0)[0].known
    assert notes_of(900, known) == []
    assert notes_of(900, folder_of(900)) == []
    (note,) = notes_of(900, folder_of(901))
    assert "FID is only comparable" in note and "here 900 are compared with 901" in note
    (note,) = notes_of(901, known)
    assert "here 901 are compared with 900" in note
    (note,) = notes_of(900, Known(known.pooled, known.spatial, None))
    assert "the statistics do not say of how many" in note
    assert notes_of(900, folder_of(901), fid=False) == []


def write_drawn(folder: Path, pictures: np.ndarray, prompts: list[str], model: str) -> Path:
    """A folder as `ditq sample` fills it."""
    folder.mkdir()
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        write_picture(folder / f"{index:05d}.png", picture, prompt=prompt, seed=index, model=model)
    return folder


@pytest.mark.slow
def test_folders_that_nano_drew_are_judged_by_their_captions(tmp_path, drawn):
    prompts = captions(sample_scenes(np.random.default_rng(0), len(drawn)))
    wrong = np.r_[drawn[:6], drawn[[7, 6]]]
    found = write_drawn(tmp_path / "a", wrong, prompts, "nano")
    exact = write_drawn(tmp_path / "b", drawn, prompts, "nano")
    data = evaluate(found, tmp_path / "out", against=exact, fid=False, batch_size=3)
    for folder, pictures in (("share", wrong), ("against", drawn)):
        verdict = judge(ScorerNetwork().scorer, mx.array(pictures) / 255, parse(prompts))
        shares = {name: row[folder] for name, row in data["accuracy"].items()}
        assert shares == {name: right.mean() for name, right in verdict.items()}
    row = data["accuracy"]["all"]
    assert row["share"] < row["against"] == 1
    assert row["difference"] == row["share"] - 1 and row["difference_interval"][0] < 0
    assert "## What the captions say" in (tmp_path / "out" / "evaluation.md").read_text()


def test_no_folder_is_judged_where_one_picture_has_no_caption_of_nanos(tmp_path, drawn):
    prompts = captions(sample_scenes(np.random.default_rng(0), 2))
    whole = write_drawn(tmp_path / "whole", drawn[:2], prompts, "nano")
    others = {
        "other words": write_drawn(tmp_path / "words", drawn[:2], [prompts[0], "red"], "nano"),
        "other model": write_drawn(tmp_path / "model", drawn[:2], prompts, "sd3-medium"),
        "no texts": write_pictures(tmp_path / "none", drawn[:2]),
        "one without": write_drawn(tmp_path / "some", drawn[:2], prompts, "nano"),
    }
    Image.fromarray(drawn[1]).save(others["one without"] / "00001.png")
    network, judged = ScorerNetwork(), open_folder(whole)
    assert all(verdicts_of([judged, judged], network))
    for why, folder in others.items():
        assert verdicts_of([judged, open_folder(folder)], network) == [None, None], why


@pytest.mark.slow
def test_two_models(tmp_path):
    """A model is equal to itself from the same noise, and no pair of another noise is made."""
    options = {"num_images": 3, "num_steps": 2, "batch_size": 2, "fid": False}
    data = evaluate(None, tmp_path / "a", model="tiny", against="tiny", **options)
    assert data["paired"]["equal"] == 3 and data["velocity"]["captions"] == 3
    assert data["paired"]["figures"]["latent"]["median"] is None  # infinite
    assert data["accuracy"]["all"]["difference"] == 0
    other = evaluate(None, tmp_path / "b", model="tiny", against="tiny", against_seed=9, **options)
    assert "paired" not in other and "seeds differ" in other["notes"][0]
    first, second = ((tmp_path / n / "evaluation.json").read_text() for n in ("a", "b"))
    assert json.loads(first)["format"] == "ditq-evaluation" and first != second
    evaluate(None, tmp_path / "a", model="tiny", against="tiny", force=True, **options)
    assert (tmp_path / "a" / "evaluation.json").read_text() == first


@pytest.mark.slow
def test_a_models_noise_floor_has_latents_and_velocities(tmp_path):
    options = {"num_images": 2, "num_steps": 2, "fid": False, "dtype": "float16"}
    data = evaluate(None, tmp_path / "a", model="tiny", against="tiny", **options)
    assert data["pictures"]["computed in"] == "float16"
    assert data["velocity"]["mean"] > 30 and data["paired"]["figures"]["latent"]["worst"] > 20
    assert (tmp_path / "a" / "velocity.png").exists()


def spoilt(folder: Path, drawn: np.ndarray, how: str) -> None:
    path = write_pictures(folder, drawn[:2]) / "001.png"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif how == "text":
        path.write_text("no picture")
    elif how == "size":
        Image.fromarray(drawn[0][:64]).save(path)
    elif how == "transparent":
        Image.new("RGBA", (128, 128)).save(path)
    elif how == "sixteen bits":
        Image.fromarray(np.zeros((128, 128), np.uint16)).save(path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", ["001.png", "cannot be read as a picture"]),
        ("text", ["001.png", "cannot be read as a picture"]),
        ("size", ["001.png has 64x128 pixels, 000.png has 128x128"]),
        ("transparent", ["001.png", "mode RGBA"]),
        ("sixteen bits", ["001.png", "mode I;16"]),
    ],
)
def test_unusable_pictures_are_one_line_and_nothing_is_written(tmp_path, drawn, how, words):
    spoilt(tmp_path / "a", drawn, how)
    result = run_here("src.evaluate", "--pictures", "a", cwd=tmp_path)
    assert_one_error_line(result, *words)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["--pictures", "--model"]),
        ("--pictures a --model nano", ["either --pictures"]),
        ("--pictures absent", ["absent", "No such file"]),
        ("--pictures empty", ["empty holds no pictures"]),
        ("--pictures a --against b", ["FID of the 2 pictures of a is undefined", "--no-fid"]),
        ("--pictures a --save-statistics s.npz", ["undefined", "193 pictures or more"]),
        ("--pictures a --save-statistics s.txt", ["s.txt must end in .npz"]),
        ("--pictures a --against b --no-fid --splits 3", ["--splits 3 is more than the 2"]),
        ("--pictures small", ["scorer reads pictures of 128x128, these have 64x64"]),
        ("--pictures a --against s.npz", ["s.npz is missing"]),
        ("--pictures a --inception w.npz", ["w.npz is missing"]),
        ("--pictures a --batch-size 0", ["--batch-size 0"]),
        ("--pictures a --against b --against-seed 5", ["--against-seed is of a model"]),
        ("--pictures a --num-steps 5", ["--num-steps is for a model that draws"]),
        ("--model tiny --num-images 0", ["--num-images 0"]),
        ("--model tiny --dtype int8", ["--dtype int8 is unknown", "float16, float32"]),
        ("--model tiny --against nano --num-images 192", ["undefined", "193"]),
        ("--model tiny --kernel dense", ["--kernel dense is for saved"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, drawn, arguments, words):
    for name, pictures in (("a", drawn[:2]), ("b", drawn[:2]), ("small", drawn[:2, :64, :64])):
        write_pictures(tmp_path / name, pictures)
    (tmp_path / "empty").mkdir()
    result = run_here("src.evaluate", *arguments.split(), cwd=tmp_path)
    assert_one_error_line(result, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "empty", "small"]


def test_pictures_are_judged_whatever_checkpoint_the_environment_has(tmp_path, drawn, monkeypatch):
    monkeypatch.setenv("DITQ_CHECKPOINT", str(tmp_path / "absent.safetensors"))
    for name in ("a", "b"):
        write_pictures(tmp_path / name, drawn[:2])
    base = ("src.evaluate", "--pictures", "a", "--no-fid")
    result = run_here(*base, "--against", "b", "--splits", "3", cwd=tmp_path)
    assert_one_error_line(result, "--splits 3 is more than the 2")
    result = run_here(*base, "--no-t5", "--against", "b", "--splits", "3", cwd=tmp_path)
    assert_one_error_line(result, "--splits 3 is more than the 2")


def test_a_checkpoint_may_be_that_of_the_model_to_compare_with(tmp_path, drawn):
    write_pictures(tmp_path / "a", drawn[:2])
    result = run_here(
        "src.evaluate", "--pictures", "a", "--against", "sd3-medium", "--checkpoint", "absent",
        cwd=tmp_path,
    )  # fmt: skip
    assert_one_error_line(result, "--checkpoint absent does not exist")


def test_models_are_told_from_folders_of_pictures(tmp_path, drawn):
    """A saved Stable Diffusion 3 has its config.json in transformer/."""
    write_pictures(tmp_path / "a", drawn[:1])
    (tmp_path / "saved" / "transformer").mkdir(parents=True)
    (tmp_path / "saved" / "transformer" / "config.json").write_text('{"ditq": {}}')
    assert is_model("nano") and is_model(str(tmp_path / "saved"))
    assert is_model(ModelChoice("sd3-medium", Path("a.safetensors")))
    assert is_model(ModelChoice(None, Path("a.safetensors")))
    assert not is_model(str(tmp_path / "a"))


def test_the_help_names_every_kernel():
    help = " ".join(run_here("src.evaluate", "--help").stdout.split())
    assert ", ".join(BACKEND_NAMES) in help
