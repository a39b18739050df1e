"""A folder of MoDiff's rows: drawn by `src.sample`, judged against each other, results kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.adaround_optimize import adaround_optimize
from src.analyze_activations import analyze_activations
from src.cache_adaround_data import cache_adaround_data
from src.collect_layer_activations import collect_layer_activations
from src.distributed import Ranks
from src.evaluation.networks import Features, ScorerNetwork
from src.generate_calibration_data import generate_calibration_data
from src.inference.residual_options import Inputs
from src.inference.residuals import Work, cache_bytes
from src.mass_sampling.work import kept_latents
from src.models.load import load_pipeline
from src.models.nano.render import render
from src.models.nano.scenes import SceneBatch, sample_scenes
from src.sample import sample
from src.store import MANIFEST_NAME, hash_json

import mlx.core as mx
import numpy as np

from tools.modiff_results import (
    Limit,
    Sets,
    Took,
    counts_of,
    drawn_features,
    growing,
    kept_counts,
    kept_sets,
    latent_figures,
    load_result,
    measured,
    save_result,
    set_figures,
    whole_batches,
)
from tools.modiff_rows import OTHER_SEED, PICTURE_SEED, SIXTEEN, Row, all_rows

MODEL, SCENE_SEED = "nano", 50
CHUNK = 256  # pictures at once for renderer and scorer
KEPT_LATENTS = 1024
QUARTER = 0.25  # of the whole cache, for the rows that choose layers
OTHER_NOISE, NOTHING = Row(seed=OTHER_SEED), Took(0, 0.0)


@dataclass(frozen=True)
class Bench:
    """The folder of work, and the order that all rows share."""

    work: Path
    num_pictures: int
    steps: int
    batch: int
    tracks: dict[str, Any]

    @property
    def run(self) -> dict[str, int]:
        """What results have to agree in, to stand in one table."""
        return {"steps": self.steps, "num_pictures": self.num_pictures}

    @property
    def settings(self) -> str:
        """Hash of all else that decides what is drawn."""
        told = {key: str(value) for key, value in self.tracks.items()}
        return hash_json({"batch": self.batch, **told})

    @property
    def rows(self) -> Path:
        return self.work / f"rows_{self.num_pictures}_{self.steps}"

    @property
    def results(self) -> Path:
        """One small file a row, for --merge on another machine."""
        return self.work / f"results_{self.num_pictures}_{self.steps}"

    @property
    def prompts(self) -> Path:
        return self.work / f"captions_{self.num_pictures}.txt"

    @property
    def latents(self) -> int:
        return min(self.num_pictures, KEPT_LATENTS)

    @property
    def batches(self) -> list[range]:
        count, size = self.num_pictures, min(self.batch, self.num_pictures)
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def scenes(self) -> SceneBatch:
        return sample_scenes(np.random.default_rng(SCENE_SEED), self.num_pictures)

    def draw(self, row: Row, limit: Limit) -> None:
        """A row's features and first latents, within the limit; goes on where it was stopped."""
        weights, config = (None, "none")
        if row.weight_bit != SIXTEEN:
            weights, config = self.weights(row.weight_bit), self.config()
        memory = None
        if row.modulate == "auto":
            memory = QUARTER * self.whole_cache() / 1e9
        sample(
            self.rows / row.folder,
            model=MODEL,
            adaround_output=weights or "",
            quant_config=config,
            weight_bit=row.weight_bit,
            inputs=Inputs(
                row.act_bit,
                row.modulate,
                memory,
                row.scale,
                self.tracks["scale_pictures"],
                rest_bit=row.rest_bit,
            ),
            timesteps=self.steps,
            num_samples=self.num_pictures,
            prompts=str(self.prompts),
            seed=row.seed,
            batch_size=self.batch,
            keep="features",
            keep_latents=self.latents,
            kernel=self.tracks["kernel"],
            dtype=self.tracks["dtype"],
            go_on=limit,
        )
        limit.end_batch()

    def whole_cache(self) -> int:
        """Bytes that all layers would keep for a batch."""
        pipeline = load_pipeline(MODEL)
        weight, size = pipeline.defaults.cfg_weight, min(self.batch, self.num_pictures)
        return sum(cache_bytes(pipeline, Work.of(pipeline, self.steps, weight, size)).values())

    def config(self) -> Path:
        """The activation track's, 8 bits; its smoothing is rounded into the weights."""
        if self.tracks["quant_config"] is not None:
            return self.tracks["quant_config"]
        path = self.calibration / "activations" / "quant_config.json"
        if not path.exists():
            stats = together(collect_layer_activations(self.calibration, num_images=16))
            if Ranks.here().rank == 0:
                analyze_activations(stats, policy="error", tiers=(8,))
        return together(path)

    @property
    def calibration(self) -> Path:
        images = self.tracks["num_images"]
        folder = self.work / "calibration"
        return together(generate_calibration_data(MODEL, folder, num_images=images))

    def weights(self, bits: int) -> Path:
        """The weight track's result."""
        if self.tracks[f"adaround_output_{bits}"] is not None:
            return self.tracks[f"adaround_output_{bits}"]
        folder = self.work / f"adaround_output_{bits}"
        if not (folder / MANIFEST_NAME).exists():
            images = self.tracks["num_images"]
            adaround_optimize(
                together(cache_adaround_data(self.calibration, num_images=images, stride=3)),
                folder,
                bits_w=bits,
                method=self.tracks["method"],
                iters=self.tracks["iters"],
                quant_config=self.config(),
            )
        return together(folder)

    def rendered(self, eyes: ScorerNetwork, counts: Sequence[int]) -> Sets:
        """Moments of the features of the first scenes, rendered once."""
        folder = self.work / f"rendered_{self.num_pictures}"
        return kept_sets(folder, counts, eyes.identity, lambda: self.rendered_features(eyes))

    def rendered_features(self, eyes: ScorerNetwork) -> Iterator[Features]:
        scenes = self.scenes()
        for start in range(0, self.num_pictures, CHUNK):
            shown = mx.clip(render(scenes[start : start + CHUNK]), 0, 1)
            yield eyes(np.array(mx.round(shown * 255).astype(mx.uint8)))

    def figures(self, row: Row, eyes: ScorerNetwork) -> dict[str, Any]:
        """Of what there is of a row."""
        batches, latents = self.whole(row), self.kept(row)
        figures: dict[str, Any] = {"pictures": batches[-1].stop, "at": {}}
        for key, other in (("latent", Row()), ("latent_own_weights", row.own_floats)):
            paired = row.seed == PICTURE_SEED and other != row and self.whole(other)
            figures[key] = latent_figures(self.kept(other), latents) if paired else None
        counts = counts_of(figures["pictures"], eyes.identity)
        truth = self.rendered(eyes, counts)
        noise = self.other_noise(eyes, counts) if row.seed == PICTURE_SEED else {}
        drawn = drawn_features(self.rows / row.folder, batches)
        for count, statistics in growing(drawn, eyes.identity, counts):
            figures["at"][str(count)] = set_figures(statistics, count, truth, noise)
        return figures

    @property
    def noise(self) -> Path:
        """Of what pictures from other noise are: with this folder another machine draws none."""
        how = f"{self.num_pictures}_{self.steps}_{self.batch}_{self.tracks['dtype']}"
        return self.work / f"other_noise_{how}"

    def other_noise(self, eyes: ScorerNetwork, counts: Sequence[int]) -> Sets:
        """Moments of full precision's first pictures from other noise, as far as there are."""
        drawn, kept = self.pictures(OTHER_NOISE), kept_counts(self.noise)
        known = [count for count in counts if count <= drawn or count in kept]
        batches = self.whole(OTHER_NOISE)
        return kept_sets(
            self.noise,
            known,
            eyes.identity,
            lambda: drawn_features(self.rows / OTHER_NOISE.folder, batches),
        )

    def whole(self, row: Row) -> list[range]:
        return whole_batches(self.rows / row.folder, self.batches)

    def pictures(self, row: Row) -> int:
        return max((batch.stop for batch in self.whole(row)), default=0)

    def lacks(self, row: Row, limit: Limit) -> bool:
        """Whether the row is to be opened: it has not all of its pictures, or has those of other
        settings, which drawing refuses."""
        few = len(self.whole(row)) < sum(map(limit.wants, self.batches))
        return few or self.result(row).get("settings") != self.settings

    def judged_from(self, row: Row) -> dict[str, Any]:
        """All that its figures are of: pictures of a row and of those that it is compared with."""
        rows = (row, Row(), row.own_floats, OTHER_NOISE)
        counts = {each.name: self.pictures(each) for each in rows}
        counts[OTHER_NOISE.name] = max(counts[OTHER_NOISE.name], *kept_counts(self.noise), 0)
        return {"settings": self.settings, "judged_from": counts}

    def kept(self, row: Row) -> np.ndarray:
        kept = [batch for batch in self.whole(row) if batch.start < self.latents]
        return kept_latents(self.rows / row.folder, kept)

    def result(self, row: Row) -> dict[str, Any]:
        """As it was judged last; nothing where it was not."""
        path = self.results / f"{row.folder}.json"
        return load_result(path, self.run) if path.exists() else {}

    def judge(self, row: Row, eyes: ScorerNetwork, took: Took = NOTHING) -> None:
        """Writes a row's results, as far as it is drawn; `took` is what drawing took."""
        known = self.result(row)
        head = {
            "name": row.name,
            **self.run,
            **self.judged_from(row),
            "drawn": known.get("drawn", 0) + took.pictures,
            "seconds": known.get("seconds", 0.0) + took.seconds,
            "measured": known.get("measured", measured()),
        }
        save_result(self.results / f"{row.folder}.json", head | self.figures(row, eyes))

    def judge_all(self, eyes: ScorerNetwork, afresh: bool) -> None:
        """All rows that are drawn: some are compared with ones that came later. Without `afresh`
        those alone of which something changed since."""
        for row in all_rows():
            changed = not self.judged_from(row).items() <= self.result(row).items()
            if self.whole(row) and (afresh or changed):
                self.judge(row, eyes)


def together(path: Path) -> Path:
    """What ranks make together, once the last of them is done with it."""
    Ranks.here().barrier()
    return path
