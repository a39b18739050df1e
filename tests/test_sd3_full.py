"""The full-size benchmark: its checkpoints are what is published, and its report says what was."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from src.models.configs import config_named
from src.models.load import SD3, load_pipeline

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from tools.bench_sd3_full import Bench, main
from tools.sd3_full_report import table_row, verdict
from tools.sd3_full_stages import Settings, stages
from tools.sd3_full_weights import Shapes, parameters, stability, write_checkpoint

from .checkpoint_layouts import to_stability
from .helpers import random_model, refuse_network

ROW = {
    "name": "open it",
    "pixels": None,
    "one_copy": True,
    "status": "done",
    "seconds": 1.0,
    "process_start_bytes": 10**9,
}


@pytest.mark.parametrize("name", ["tiny", "tiny-3.5-medium", "tiny-3.5-large"])
def test_names_are_those_of_stabilitys_file(name):
    model = random_model(replace(config_named(name), text_dim=16, position_size=4))
    found, wanted = stability(parameters(model)), to_stability(model)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert mx.array_equal(found[key], tensor), key


@pytest.mark.sd3
@pytest.mark.slow
@pytest.mark.parametrize("model", SD3)
def test_the_checkpoint_is_whole(model, tmp_path, monkeypatch):
    refuse_network(monkeypatch, tmp_path / "no-cache")
    write_checkpoint(tmp_path / "made", model, tiny=True)
    pipeline = load_pipeline(None, checkpoint=tmp_path / "made")
    assert pipeline.name == model
    assert pipeline.transformer.config == Shapes.of(model, tiny=True).transformer
    latent = pipeline.sample(["the"], [0], num_steps=2, height=32, width=32)
    picture = pipeline.decode(latent)
    assert picture.shape == (1, 32, 32, 3) and picture.std() > 5
    assert np.isfinite(np.array(latent)).all()


def test_less_than_two_copies_pass_and_more_fail():
    one = {**ROW, "mlx_peak_bytes": 4 * 10**9, "process_peak_bytes": 3 * 10**9}
    two = {**ROW, "mlx_peak_bytes": 10**9, "process_peak_bytes": 9 * 10**9}
    assert "| 1.00, pass |" in table_row(one, 4 * 10**9)
    assert "| 2.00, FAIL |" in table_row(two, 4 * 10**9)
    said = verdict({"rows": [one, two, {**ROW, "status": "not run"}], "transformer_bytes": 4e9})
    assert "1 of 3 processes" in said and "1 did not finish" in said


def test_what_time_did_not_allow_is_listed(tmp_path):
    settings = Settings("sd3.5-large", pixels=(64,))
    Bench(settings, True, tmp_path, tmp_path).run(seconds=0)
    data = json.loads((tmp_path / "sd3_full_sd3.5-large.json").read_text())
    assert [row["status"] for row in data["rows"]] == ["not run"] * len(stages(settings, True))
    page = (tmp_path / "sd3_full.md").read_text()
    assert len(re.findall(r"\| not run \|", page)) == len(data["rows"])


def test_a_models_runs_stand_beside_each_other(tmp_path):
    settings = Settings("sd3-medium", pixels=(64,))
    for run in ("", "without T5"):
        Bench(settings, True, tmp_path, tmp_path, run=run).run(seconds=0)
    page = (tmp_path / "sd3_full.md").read_text()
    assert re.findall("^## .*", page, re.M) == [
        "## sd3-medium (tiny)",
        "## sd3-medium (tiny), without T5",
    ]


def test_a_stage_that_fails_is_a_row_with_its_last_line(tmp_path):
    bench = Bench(Settings("sd3-medium", pixels=(64,)), True, tmp_path, tmp_path)
    opened = stages(bench.settings, True)[1]
    row = bench.measured(opened, limit=60)
    assert row["status"] == "failed" and "--checkpoint checkpoint does not exist" in row["error"]
    assert row["process_peak_bytes"] > 0 and row["error"] in table_row(row, None)


def test_what_lies_beside_its_own_folder_stays(tmp_path):
    """A user's artifacts have the same names."""
    mine, old = tmp_path / "calibration_data", tmp_path / "sd3_full" / "calibration_data"
    for folder in (mine, old):
        folder.mkdir(parents=True)
    told = ["--tiny", "--seconds", "0"]
    output = CliRunner().invoke(main, [*told, "--work", str(tmp_path)]).output
    assert mine.exists() and not old.exists()
    assert f"report in {tmp_path / 'sd3_full'}" in output
    assert (tmp_path / "sd3_full" / "sd3_full.md").is_file()
    alone = CliRunner().invoke(main, told).output
    assert "stages done\n" in alone and "report in" not in alone
