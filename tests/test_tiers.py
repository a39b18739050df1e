"""Tiers, budgets, clip search, segments and the quantizers that simulate them."""

from __future__ import annotations

from itertools import product

from src.errors import UserError
from src.quant import clip, plan, segments, tiers
from src.quant.artifacts import LayerConfig
from src.quant.simulate import CurrentStep, static_quantizer, token_quantizer
from src.quant.tiers import Range, Thresholds

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ALL = (4, 6, 8)


def range_of(absmax, p50=1.0, p99=3.0, wide=100, shifted=False):
    """100 channels, some of them with that range, the others as wide as p99."""
    return Range(p50, p99, np.r_[np.full(wide, absmax), np.full(100 - wide, p99)], shifted)


@pytest.mark.parametrize(
    "found, bits",
    [
        (range_of(5.99), 4),
        (range_of(6.0), 6),
        (range_of(9.99), 6),
        (range_of(10.0), 8),
        (range_of(4.99, shifted=True), 4),
        (range_of(5.5, shifted=True), 6),
        (range_of(2.0, p50=0.01, p99=1.0), 8),  # flat but for a few: p99/p50 of 100
        (range_of(0.0, p50=0.0, p99=0.0), 4),  # an input that is zero everywhere
    ],
)
def test_the_published_thresholds(found, bits):
    assert tiers.threshold_tier(found, Thresholds(), ALL) == bits


def test_isolated_spikes_move_one_tier_down_where_they_are_smoothed():
    spiky = range_of(16.0, wide=1)
    assert tiers.has_spikes(spiky, Thresholds())
    assert tiers.threshold_tier(spiky, Thresholds(), ALL) == 8
    assert tiers.threshold_tier(spiky, Thresholds(), ALL, smoothed=True) == 6
    for other in (range_of(14.9, wide=1), range_of(16.0, wide=5)):
        assert not tiers.has_spikes(other, Thresholds())


def test_every_number_of_the_rule_can_be_changed():
    assert tiers.threshold_tier(range_of(7.0), Thresholds(a4_below=7.5), ALL) == 4
    assert tiers.threshold_tier(range_of(7.0), Thresholds(a6_below=7.0), ALL) == 8
    assert (
        tiers.threshold_tier(range_of(5.5, shifted=True), Thresholds(a4_below_shifted=6), ALL) == 4
    )
    assert tiers.threshold_tier(range_of(1.0), Thresholds(high_ratio=2.0), ALL) == 8
    assert tiers.has_spikes(range_of(7.0, wide=20), Thresholds(spike_ratio=2, spike_channels=0.3))


def test_tiers_that_are_not_allowed_give_way_to_the_next_wider():
    assert tiers.threshold_tier(range_of(1.0), Thresholds(), (8,)) == 8
    assert tiers.threshold_tier(range_of(1.0), Thresholds(), (6, 8)) == 6
    assert tiers.threshold_tier(range_of(99.0), Thresholds(), (4,)) == 4


@pytest.mark.parametrize(
    "numbers, words",
    [
        ({"a4_below": 11.0}, "out of order.*--a4-below 11.0.*--a6-below 10.0"),
        ({"a4_below_shifted": 10.5}, "out of order.*--a4-below-shifted"),
        ({"a6_below": 0.0}, "--a6-below must be above 0"),
        ({"spike_ratio": float("nan")}, "--spike-ratio must be above 0, got nan"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(numbers, words):
    with pytest.raises(UserError, match=words):
        Thresholds(**numbers)


@pytest.mark.parametrize("bits", [(), (1,), (4, 9), (16,)])
def test_tiers_that_cannot_be_are_refused(bits):
    with pytest.raises(UserError, match="--tiers"):
        tiers.check_tiers(bits)


@given(
    seed=st.integers(0, 999),
    cells=st.integers(1, 5),
    allowed=st.sampled_from([(4, 6, 8), (4, 8), (6,), (3, 4, 8)]),
)
def test_the_frontier_is_what_trying_everything_finds(seed, cells, allowed):
    rng = np.random.default_rng(seed)
    errors = rng.uniform(0, 1, (cells, len(allowed))).round(2)
    linears = rng.integers(1, 4, cells)
    found = tiers.frontier(errors, linears, allowed)
    choices = list(product(range(len(allowed)), repeat=cells))
    bits = np.array([[allowed[i] for i in choice] for choice in choices])
    totals = np.array([errors[range(cells), choice].sum() for choice in choices])
    averages = bits @ linears / linears.sum()
    for average in np.unique(averages):
        units = found.within_bits(average)
        chosen = found.tiers_at(units)
        spent = errors[range(cells), [allowed.index(b) for b in chosen]].sum()
        assert spent == pytest.approx(totals[averages <= average + 1e-9].min())
        assert (chosen @ linears) / linears.sum() <= average + 1e-9
    for target in (0.0, 0.5, totals.min(), totals.max()):
        chosen = found.tiers_at(found.within_error(target))
        enough = averages[totals <= target]
        wanted = enough.min() if len(enough) else None
        if wanted is not None:
            assert (chosen @ linears) / linears.sum() == pytest.approx(wanted)


@pytest.mark.parametrize("bits", [3.9, float("nan")])
def test_a_budget_below_the_lowest_tier_is_refused(bits):
    tiers.check_average(4.0, ALL)
    with pytest.raises(UserError, match=f"--average-bits {bits} is below the lowest tier, 4"):
        tiers.check_average(bits, ALL)


def test_average_bits_count_linears():
    bits = np.array([[4, 4], [8, 8]])
    assert tiers.average_bits(bits, np.array([3, 1])) == 5.0


@given(
    seed=st.integers(0, 999), bits=st.sampled_from(ALL), heavy=st.booleans(), n=st.integers(1, 400)
)
def test_clipping_is_never_worse_than_absmax(seed, bits, heavy, n):
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_t(2, n) if heavy else rng.standard_normal(n))
    weights, top = np.ones(n), values.max()
    scale, error = clip.clipped_scale(values, weights, top, bits)
    both = clip.squared_error(
        np.append(values, top),
        np.append(weights, 1.0),
        np.array([scale, top / (2 ** (bits - 1) - 1)]),
        bits,
    )
    assert error == pytest.approx(both[0]) and both[0] <= both[1] * (1 + 1e-12)


def test_nothing_counted_or_all_zero_falls_back_to_absmax():
    nothing = np.zeros(0)
    assert clip.clipped_scale(nothing, nothing, 12.7, 8) == (pytest.approx(0.1), 0.0)
    scale, error = clip.clipped_scale(np.zeros(4), np.ones(4), 0.0, 4)
    assert scale > 0 and error == 0.0


@given(seed=st.integers(0, 999), n=st.integers(1, 8), runs=st.integers(1, 5))
def test_segments_are_what_trying_every_cut_finds(seed, n, runs):
    curve = np.random.default_rng(seed).standard_normal(n).round(1)
    begins = segments.cut(curve, runs)

    def cost(starts):
        ends = [*starts[1:], n]
        parts = [curve[a:b] for a, b in zip(starts, ends, strict=True)]
        return sum(((part - part.mean()) ** 2).sum() for part in parts)

    options = [[0, *(i + 1 for i in range(n - 1) if mask >> i & 1)] for mask in range(2 ** (n - 1))]
    best = min(cost(starts) for starts in options if len(starts) <= runs)
    assert begins[0] == 0 and begins == sorted(set(begins)) and len(begins) <= runs
    assert cost(begins) == pytest.approx(best, abs=1e-9)


def test_a_steady_curve_gets_one_scale_and_a_step_gets_two():
    assert len(set(segments.segmented_scales(np.array([1.0, 1.05, 1.02]), 3, 1.1))) == 1
    got = segments.segmented_scales(np.array([1.0, 1.0, 4.0, 4.0]), 2, 1.1)
    assert np.allclose(got, [1, 1, 4, 4])
    with pytest.raises(UserError, match="--segments"):
        segments.segmented_scales(np.array([1.0, 2.0]), 0, 1.1)


def test_a_layer_shares_scales_within_a_tier_only():
    table = plan.ScaleTable(
        ALL, np.array([[8.0, 4.0, 1.0]] * 2 + [[16.0, 8.0, 2.0]] * 2), np.ones((4, 3))
    )
    layer = table.layer([4, 8, 8, 4], segments=1, steady=1.1)
    assert layer.bits == [4, 8, 8, 4]
    assert np.allclose(layer.scale, [np.sqrt(128), np.sqrt(2), np.sqrt(2), np.sqrt(128)])
    assert table.layer([4, 8, 8, 4]).scale == [8.0, 1.0, 2.0, 16.0]


def test_largest_values_are_exact_with_shift_and_smoothing():
    rng = np.random.default_rng(0)
    x, shift, factors = (
        rng.standard_normal((3, 50, 4)) * 3,
        rng.standard_normal(4),
        rng.uniform(0.5, 2, 4),
    )
    low, high = x.min(axis=1), x.max(axis=1)
    assert np.allclose(plan.largest_values(low, high), np.abs(x).max(axis=(1, 2)))
    wanted = (np.abs(x - shift) / factors).max(axis=(1, 2))
    assert np.allclose(plan.largest_values(low, high, shift, factors), wanted)


def test_quantizers_follow_the_designs_formula_at_each_rows_step():
    rng = np.random.default_rng(1)
    x = mx.array(rng.standard_normal((4, 5, 6)).astype(np.float32) * 3)
    shift, factors = (rng.uniform(0.5, 2, 6).astype(np.float32) for _ in range(2))
    layer = LayerConfig([4, 8], [0.4, 0.02], shift, factors)
    step = CurrentStep([1.0, 0.5])
    quantize = static_quantizer(step, layer)
    seen = []

    def model(latent, text, pooled, time):
        seen.append(np.array(quantize(x)))
        return latent

    step.following(model)(x, x, x, mx.array([1000.0, 499.0, 990.0, 520.0]))
    for row, index in enumerate([0, 1, 0, 1]):
        limit, scale = ((7, 0.4), (127, 0.02))[index]
        codes = np.clip(np.round((np.array(x[row]) - shift) / factors / scale), -limit, limit)
        assert np.allclose(seen[0][row], codes * scale * factors + shift, atol=2e-5)


def test_per_token_scales_clip_nothing():
    x = mx.array(np.random.default_rng(2).standard_t(2, (2, 7, 16)).astype(np.float32))
    step = CurrentStep([1.0])
    step.rows = mx.array([0, 0])
    got = token_quantizer(step, LayerConfig([8], [1.0]))(x)
    bound = mx.abs(x).max(axis=-1, keepdims=True) / 127 / 2
    assert (mx.abs(got - x) <= bound * 1.001).all().item()


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("bits", ALL)
def test_two_regions_fit_into_the_bits_and_keep_small_values(bits, sides):
    """As many different codes as the tier has, whole numbers, and the fine ones near 0."""
    coarse, scale = 6, 0.01
    layer = LayerConfig([bits], [scale], coarse=coarse, coarse_sides=sides)
    step = CurrentStep([1.0])
    x = mx.arange(-400_000, 400_001).astype(mx.float32)[None] * 1e-4
    codes = np.rint(np.array(static_quantizer(step, layer)(x)) / scale).astype(int)
    distinct = np.unique(codes)
    assert len(distinct) <= 2**bits
    fine = 2 ** (bits - 2) - 1
    assert set(range(-fine, fine + 1)) <= set(distinct.tolist())
    beyond = distinct[np.abs(distinct) > fine]
    assert (beyond % coarse == 0).all()
    assert distinct.max() == coarse * (fine if sides == 2 else 2 ** (bits - 1) - 1)
    assert distinct.min() == (-coarse * fine if sides == 2 else -fine)


def test_the_simulated_codes_are_those_of_the_clip_search():
    x = np.abs(np.random.default_rng(4).standard_t(3, 500)).astype(np.float32)
    for sides, bits in product((1, 2), ALL):
        regions = clip.Regions(4, sides)
        layer = LayerConfig([bits], [0.03], coarse=4, coarse_sides=sides)
        got = np.array(static_quantizer(CurrentStep([1.0]), layer)(mx.array(x)[None]))[0] / 0.03
        assert (np.abs(got - regions.codes(x / np.float32(0.03), bits)) < 1e-3).all()


def test_long_tailed_gelu_inputs_have_less_error_with_two_regions_than_with_a_shift():
    x = np.random.default_rng(5).standard_t(3, 20_000)
    x = x / (1 + np.exp(-1.702 * x))
    weights, lowest = np.ones(len(x)), np.array([x.min()])
    shift = np.array([(x.min() + x.max()) / 2])
    centred = (np.abs(x - shift), weights)
    plain = plan.scale_table([centred], np.array([centred[0].max()]), ALL, shift)
    tables = [
        plan.scale_table(
            [(np.abs(x), weights)], np.array([x.max()]), ALL, regions=regions, lowest=lowest
        )
        for regions in plan.two_region_layouts(post_gelu=True)
    ]
    scales = plan.InputScales((plain, *tables))
    for index, tier in enumerate(ALL):
        best = scales.best([tier])
        assert best.regions.sides == 1 and best.regions.coarse > 1
        assert best.error[0, index] < plain.error[0, index]
        got = np.array(
            static_quantizer(CurrentStep([1.0]), scales.layer([tier]))(mx.array(x)[None])
        )
        assert np.abs(got[0] - x)[x < 0].max() <= best.scale[0, index]  # no negative one is clipped


def test_the_layout_of_codes_is_the_best_for_the_tiers_and_fits_into_a_byte_where_it_must():
    x = np.abs(np.random.default_rng(6).standard_t(2, 20_000))
    points, largest = [(x, np.ones(len(x)))] * 2, np.full(2, x.max())
    layouts = [clip.PLAIN, *plan.two_region_layouts(post_gelu=False)]
    tables = tuple(plan.scale_table(points, largest, ALL, regions=layout) for layout in layouts)
    free, narrow = plan.InputScales(tables), plan.InputScales(tables, bytes_only=True)
    for bits in ([4, 4], [6, 6], [8, 8], [4, 8]):
        assert free.best(bits).level(bits) == min(table.level(bits) for table in tables)
        layer = narrow.layer(bits)
        assert clip.Regions(layer.coarse, layer.coarse_sides).largest_code(max(bits)) <= 127
    assert free.best([8, 8]).regions.coarse > 2 >= narrow.best([8, 8]).regions.coarse
    assert narrow.best([6, 6]) is free.best([6, 6])  # 15 coarse steps of at most 8
    for index, tier in enumerate(ALL):
        assert np.array_equal(free.error[:, index], free.best([tier] * 2).error[:, index])
