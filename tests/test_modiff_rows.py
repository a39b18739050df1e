"""MoDiff's benchmark: rows and goals, equal counts, what is merged, and how far a run goes."""

from __future__ import annotations

from src.errors import UserError
from src.evaluation.networks import Features, Identity
from src.evaluation.statistics import Statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.modiff_results import (
    Limit,
    counts_of,
    growing,
    merged,
    moments_of,
    save_result,
    whole_batches,
)
from tools.modiff_rows import (
    EXACT,
    OTHER,
    all_rows,
    auto_lines,
    by_priority,
    chosen_rows,
    goals,
    line,
)

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


def test_names_and_folders_are_those_of_one_row():
    for kind in ("name", "folder"):
        assert len({getattr(each, kind) for each in all_rows()}) == len(all_rows())


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
    assert names[:2] == [EXACT, OTHER] and names[2].startswith("W8A8")
    assert "auto" in names[-1] and len(names) == len(all_rows())


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
        save_result(tmp_path / folder / "x.json", {"name": "x", "steps": 30} | row(pictures))
    assert merged([tmp_path / "b", tmp_path / "a"])["x"]["pictures"] == 512
    save_result(tmp_path / "b" / "y.json", {"name": "y", "steps": 100} | row())
    with pytest.raises(UserError, match="100 steps, other results are of 30"):
        merged([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="no folder .*nowhere of results"):
        merged([tmp_path / "nowhere"])


def test_a_run_goes_as_far_as_it_is_told():
    few, late = Limit(None, 20), Limit(0.0, None)
    assert [few(range(start, start + 16)) for start in (0, 16, 32)] == [True, True, False]
    assert not late.time_left() and not late(range(0, 16))
