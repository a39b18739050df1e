"""MoDiff's benchmark: rows and goals, equal counts, what is merged, and how far a run goes."""

from __future__ import annotations

import json
import re
import time

from src.errors import UserError
from src.evaluation.networks import Features, Identity
from src.evaluation.statistics import Statistics

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import bench_common
from tools.bench_modiff import main
from tools.modiff_results import (
    Limit,
    counts_of,
    growing,
    kept_counts,
    kept_sets,
    merged,
    moments_of,
    save_result,
    whole_batches,
    without,
)
from tools.modiff_rows import (
    EXACT,
    OTHER,
    all_rows,
    auto_lines,
    by_priority,
    chosen_rows,
    drawn_where,
    goals,
    line,
)

RUN = {"steps": 30, "num_pictures": 2000}
EYES = Identity("eyes", "00", 3, 4, 2)
DISTANCES = {"fid": 1.0, "sfid": 1.0, "to_full_precision": 1.0, "inception_score": [2.0, 0.1]}


def row(pictures: int = 2000, db: float = 1.0, **at) -> dict:
    latent = {"mean": db, "interval": [db, db], "median": db, "worst": db}
    at = at or {str(pictures): DISTANCES}
    return {"pictures": pictures, "latent": latent, "latent_own_weights": latent, "at": at}


def test_every_goal_can_be_judged():
    rows = {each.name: row(db=float(i)) for i, each in enumerate(all_rows())}
    found = goals()
    assert len(found) > 10 and all(goal.judged(rows) for goal in found)
    assert len(auto_lines(rows)) == sum(each.modulate == "auto" for each in all_rows())
    assert all(line(name, figures).count("|") == 11 for name, figures in rows.items())


def test_small_distances_are_not_rounded_away():
    found = row(2000, **{"2000": DISTANCES | {"fid": 0.00060249, "sfid": 7.98219}})
    assert "| 0.000602 | 7.98 |" in line(EXACT, found)


def test_names_and_folders_are_those_of_one_row():
    for kind in ("name", "folder"):
        assert len({getattr(each, kind) for each in all_rows()}) == len(all_rows())


def test_a_table_says_who_drew_it_and_what_it_lacks():
    def measured(device, date):
        return {"measured": {"device": device, "mlx": "1", "date": date}}

    rows = {each.name: measured("GPU", "2026-01-02") for each in all_rows()[:-1]}
    rows[EXACT] = measured("CPU", "2026-01-01")
    where, missing = drawn_where(rows)
    assert where == "Drawn on CPU with MLX 1, GPU with MLX 1, 2026-01-01 to 2026-01-02."
    assert missing == f"Not drawn yet: {all_rows()[-1].name}."
    assert len(drawn_where({**rows, all_rows()[-1].name: rows[EXACT]})) == 1


def test_distances_are_compared_at_equal_counts_only():
    goal = next(goal for goal in goals() if goal.key == "fid")
    rows = {
        goal.row: row(5000, **{"2000": DISTANCES | {"fid": 7.0}, "5000": DISTANCES}),
        goal.other: row(2000, **{"2000": DISTANCES | {"fid": 6.0}}),
    }
    assert ": 7, bound 6: not reached (of 2,000 pictures each)" in goal.judged(rows)
    rows[goal.other] = row(1000)
    assert goal.judged(rows) is None


def test_what_others_are_compared_with_is_drawn_first():
    names = [each.name for each in by_priority(chosen_rows(None))]
    assert names[:2] == [EXACT, OTHER] and names[3].startswith("W8A8")
    assert "auto" in names[-1] and len(names) == len(all_rows())
    for each in all_rows():
        assert names.index(each.own_floats.name) <= names.index(each.name), each.name


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6), cut=st.integers(5, 20))
def test_the_first_pictures_statistics_are_those_of_them_alone(sizes, cut):
    """Wherever batches end."""
    rng, total = np.random.default_rng(0), sum(sizes)
    whole = Features(*(rng.random((total, n)).astype(np.float32) + 0.1 for n in (3, 4, 2)))
    ends = np.cumsum(sizes)
    parts = [
        Features(whole.pooled[a:b], whole.spatial[a:b], whole.probabilities[a:b])
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]
    found = {}
    for count, statistics in growing(iter(parts), EYES, [cut, total] if cut < total else [total]):
        found[count] = moments_of(statistics)
    assert set(found) == {min(cut, total), total}
    for count, (pooled, spatial) in found.items():
        alone = Statistics(EYES)
        alone.add(Features(*(getattr(whole, k)[:count] for k in vars(whole))), ["x"] * count)
        for got, wanted in zip((pooled, spatial), moments_of(alone), strict=True):
            np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-9)
            np.testing.assert_allclose(got.covariance, wanted.covariance, atol=1e-9)


def test_sets_that_were_kept_need_no_features(tmp_path):
    """Such as on another machine, with a copy of the folder; those of other counts are added."""
    rng = np.random.default_rng(0)
    features = [Features(*(rng.random((6, n)) + 0.1 for n in (3, 4, 2))) for _ in range(2)]
    drawn = kept_sets(tmp_path, [5, 7], EYES, lambda: iter(features))
    copied = kept_sets(tmp_path, [7, 5], EYES, lambda: pytest.fail("features were asked for"))
    assert copied.keys() == drawn.keys() and kept_counts(tmp_path) == [5, 7]
    for count, (pooled, _) in drawn.items():
        np.testing.assert_array_equal(copied[count][0].covariance, pooled.covariance)
    grown = kept_sets(tmp_path, [7, 12], EYES, lambda: iter(features))
    assert not np.array_equal(grown[12][0].mean, grown[7][0].mean)


def test_sets_are_larger_than_there_are_features():
    assert counts_of(3, EYES) == [] and counts_of(600, EYES) == [500, 600]


def test_a_row_counts_as_far_as_its_batches_are_whole(tmp_path):
    batches = [range(0, 4), range(4, 8), range(8, 10)]
    (tmp_path / "features").mkdir()
    for start in (0, 8):
        (tmp_path / f"features/{start:05d}.npz").touch()
    assert whole_batches(tmp_path, batches) == batches[:1]


def test_of_several_results_the_one_with_most_pictures_counts(tmp_path):
    for folder, pictures in (("a", 16), ("b", 512)):
        save_result(tmp_path / folder / "x.json", {"name": "x", **RUN} | row(pictures))
    assert merged([tmp_path / "b", tmp_path / "a"], RUN)["x"]["pictures"] == 512


def test_latents_figures_are_taken_from_where_they_could_be_compared(tmp_path):
    """A machine that had not the row of the same weights in floats leaves them out."""
    alone = row(512, db=1.0) | {"latent_own_weights": None}
    for folder, found in (("alone", alone), ("few", row(16, db=2.0))):
        save_result(tmp_path / folder / "x.json", {"name": "x", **RUN} | found)
    for folders in (("alone", "few"), ("few", "alone")):
        (got,) = merged([tmp_path / folder for folder in folders], RUN).values()
        assert got["pictures"] == 512 and got["latent"]["mean"] == 1.0
        assert got["latent_own_weights"]["mean"] == 2.0


def test_results_of_other_captions_or_steps_are_not_merged(tmp_path):
    for name, told, words in (
        ("steps", {**RUN, "steps": 100}, r"steps\.json is of --steps 100, this run is of 30"),
        ("few", {**RUN, "num_pictures": 16}, "is of --num-pictures 16, this run is of 2000"),
        ("old", {"steps": 30}, "old.json does not say its --num-pictures.*other captions"),
    ):
        save_result(tmp_path / name / f"{name}.json", {"name": name, **told} | row())
        with pytest.raises(UserError, match=words):
            merged([tmp_path / name], RUN)
    with pytest.raises(UserError, match="no folder .*nowhere of results"):
        merged([tmp_path / "nowhere"], RUN)


def test_a_wrong_merge_is_told_before_anything_is_drawn(tmp_path):
    save_result(tmp_path / "far" / "x.json", {"name": "x", **RUN} | row())
    told = ["--work", str(tmp_path / "work"), "--merge", str(tmp_path / "far"), "--steps", "2"]
    result = CliRunner().invoke(main, told)
    assert result.exit_code == 1 and "--steps 30, this run is of 2" in result.stderr
    assert not (tmp_path / "work").exists()


def test_what_is_drawn_is_neither_opened_nor_judged_again(tmp_path, monkeypatch):
    """But with other settings it is refused, and results are of what was drawn."""
    monkeypatch.setattr(bench_common, "FOLDER", tmp_path / "docs")
    base = ["--work", str(tmp_path), "--num-pictures", "3", "--steps", "2", "--batch", "2"]
    base += ["--rows", "full precision"]

    def run(*more: str) -> str:
        return CliRunner().invoke(main, [*base, *more], catch_exceptions=False).output

    assert "2 pictures in" in run("--each", "1")
    assert run().count("1 pictures in") == 2
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "results_3_2").iterdir()}
    assert len(results) == 2 and "to draw" not in run()
    assert {path: path.stat().st_mtime_ns for path in results} == results
    found = json.loads((tmp_path / "docs" / "modiff.json").read_text())["rows"][EXACT]
    assert found["pictures"] == 3 and found["drawn"] == 3 and found["num_pictures"] == 3
    refused = CliRunner().invoke(main, [*base, "--dtype", "float16"])
    assert refused.exit_code == 1 and re.search("^error: .*dtype", refused.stderr, re.M)


@pytest.mark.parametrize(
    ("told", "word"),
    [(["--rows", "zzz"], "'zzz'"), (["--num-pictures", "0"], "x>=1"), (["--steps", "0"], "x>=1")],
)
def test_a_mistake_is_one_error_line(told, word, tmp_path):
    result = CliRunner().invoke(main, ["--work", str(tmp_path / "work"), *told])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and word in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "work").exists()


def test_the_reports_command_is_that_of_all_rows():
    command = "python -m tools.bench_modiff --rows 'W8A8;W4A8' --steps 30 --rows=W8A16"
    assert without(command, "--rows") == "python -m tools.bench_modiff --steps 30"


def test_a_run_goes_as_far_as_it_is_told():
    few, late = Limit(None, 20), Limit(0.0, None)
    assert [few(range(start, start + 16)) for start in (0, 16, 32)] == [True, True, False]
    assert not late.time_left() and not late(range(0, 16))


def test_a_batch_counts_as_long_as_it_was_also_where_rows_have_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    limit = Limit(100.0, None)
    assert limit(range(0, 16))
    now[0] = 60.0
    limit.end_batch()
    assert not limit.time_left() and not limit(range(0, 16))
    other = Limit(100.0, None)
    assert other(range(0, 16))
    now[0] += 10.0
    other.end_batch()
    now[0] += 30.0  # the next row's model is opened
    assert other(range(0, 16)) and other.time_left()
