"""MoDiff's benchmark: what was to be reached is asked only of rows that are drawn."""

from __future__ import annotations

from tools.modiff_rows import all_rows, goals


def test_every_goal_can_be_judged():
    rows = {
        row.name: {"latent": 1.0, "latent_own_weights": 1.0, "fid": 1.0, "to_full_precision": 1.0}
        for row in all_rows()
    }
    found = goals()
    assert len(found) > 10 and all(goal.judged(rows) for goal in found)
