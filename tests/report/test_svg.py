"""A drawing is read back as a person reads it, by its own ticks, and gives the numbers that went in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistiller_peft.report.axes import Axis, duration, fit_axis, num_bytes, short
from bitdistiller_peft.report.svg import Bars, Series, divided_bar, heat_map, line_chart, two_histograms
from tests.report.page import Element, parse

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 6))
positive = st.floats(1e-6, 1e6).map(lambda value: float(f"{value:.6g}"))


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix(" %"))


def ruler(svg: Element, *, is_vertical: bool) -> tuple[float, float, float, float]:
    """The outermost ticks of an axis: position and value of each."""
    anchor, along = ("end", "y") if is_vertical else ("middle", "x")
    ticks = [e for e in svg.all("text", kind="tick") if e.attributes["text-anchor"] == anchor]
    shift = 4.0 if is_vertical else 0.0  # the middle of a number stands above its base line
    places = sorted((float(e.attributes[along]) - shift, number(e.text)) for e in ticks)
    return (*places[0], *places[-1])


def read(place: float, marks: tuple[float, float, float, float], *, is_log: bool = False) -> float:
    low, first, high, last = marks
    share = (place - low) / (high - low)
    return first * (last / first) ** share if is_log else first + share * (last - first)


def points_of(line: Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in line.attributes["points"].split()]  # type: ignore[misc]


@settings(max_examples=60)
@given(st.lists(finite, min_size=2, max_size=30), st.integers(1, 500))
def test_a_curve_passes_through_its_points(ys: list[float], step: int) -> None:
    xs = tuple(float(step * (at + 1)) for at in range(len(ys)))
    svg = parse(line_chart("t", [Series("one", xs, tuple(ys))], x_name="step", y_name="loss"))
    is_log = "logarithmic scale" in svg.all("desc")[0].text
    up, across = ruler(svg, is_vertical=True), ruler(svg, is_vertical=False)
    (line,) = svg.all("polyline")
    points = points_of(line)
    assert len(points) == len(ys)
    span = max(ys) - min(ys) or 1.0
    for (px, py), x, y in zip(points, xs, ys, strict=True):
        assert 0 <= px <= 420
        assert 0 <= py <= 250
        if across[0] != across[2]:
            assert read(px, across) == pytest.approx(x, abs=1e-2 * (xs[-1] - xs[0]))
        if is_log:
            assert math.log10(read(py, up, is_log=True)) == pytest.approx(
                math.log10(y), abs=0.02 * math.log10(up[1] / up[3])
            )
        elif up[0] != up[2]:
            assert read(py, up) == pytest.approx(y, abs=1e-2 * span + 1e-3 * max(map(abs, ys)))


def test_a_wide_range_of_positive_values_gets_a_logarithmic_axis() -> None:
    series = Series("one", (1.0, 2.0, 3.0), (100.0, 1.0, 0.01))
    svg = parse(line_chart("t", [series], x_name="x", y_name="y"))
    (line,) = svg.all("polyline")
    first, middle, last = (y for _, y in points_of(line))
    assert middle - first == pytest.approx(last - middle, abs=0.02)
    ticks = [e.text for e in svg.all("text", kind="tick") if e.attributes["text-anchor"] == "end"]
    assert ticks == ["0.01", "0.1", "1", "10", "100"]


def test_what_is_not_finite_is_left_out_and_two_curves_have_a_legend() -> None:
    one = Series("forward", (1.0, 2.0, 3.0), (1.0, math.nan, 3.0))
    two = Series("reverse", (1.0, 2.0), (2.0, 2.5))
    svg = parse(line_chart("t", [one, two], x_name="step", y_name="nats", from_zero=True))
    assert [len(points_of(line)) for line in svg.all("polyline")] == [2, 2]
    assert {"forward", "reverse"} <= {e.text for e in svg.all("text")}
    assert "forward ends at 3, reverse ends at 2.5" in svg.all("desc")[0].text
    assert "0" in [e.text for e in svg.all("text", kind="tick") if e.attributes["text-anchor"] == "end"]


def test_a_single_point_is_drawn() -> None:
    svg = parse(line_chart("t", [Series("one", (5.0,), (0.0,))], x_name="x", y_name="y", from_zero=True))
    assert len(svg.all("circle")) == 1


def test_a_heat_map_says_each_number_and_shades_by_it() -> None:
    values = {(0, 0): 0.1, (0, 1): 0.5, (1, 1): 0.3}
    svg = parse(heat_map("t", ["0", "1"], ["q_proj", "<up>"], values))
    cells = svg.all("g")
    assert [cell.all("title")[0].text for cell in cells] == ["0 q_proj: 0.1000", "0 <up>: 0.5000", "1 <up>: 0.3000"]
    shades = [float(cell.all("rect")[0].attributes["fill-opacity"]) for cell in cells]
    assert shades == pytest.approx([0.1, 1.0, 0.55])
    corners = [(float(c.all("rect")[0].attributes["x"]), float(c.all("rect")[0].attributes["y"])) for c in cells]
    assert corners[1][0] > corners[0][0]
    assert corners[2][1] > corners[1][1]
    assert corners[1][0] == corners[2][0]
    assert [cell.all("text")[0].text for cell in cells] == ["0.10", "0.50", "0.30"]
    assert "most in 0, <up>" in svg.all("desc")[0].text


def test_a_histogram_has_the_heights_of_its_shares_and_a_line_at_each_level() -> None:
    edges, shares = (-1.0, 0.0, 1.0, 2.0), (0.1, 0.6, 0.3)
    svg = parse(two_histograms("t", Bars(edges, shares), Bars(edges, (0.0, 1.0, 0.0)), [0.0, 1.5], "steps"))
    before = svg.all("rect", kind="bar s0")
    heights = [float(bar.attributes["height"]) for bar in before]
    assert [height / sum(heights) for height in heights] == pytest.approx(shares, abs=1e-3)
    left, right = (float(svg.all("rect", kind="bar s0")[at].attributes["x"]) for at in (0, 2))
    unit = (right - left) / 2
    lines = [float(line.attributes["x1"]) for line in svg.all("line", kind="level")]
    assert lines == pytest.approx([left + unit, left + 2.5 * unit], abs=0.05)
    alone = parse(two_histograms("t", None, Bars(edges, shares), [0.0], "steps"))
    assert not alone.all("rect", kind="bar s0")
    assert "before: not known" in [e.text for e in alone.all("text")]


@pytest.mark.parametrize("name", ['" onload="alert(1)', "' onload='alert(1)", "<script>", "&quot;"])
def test_a_hostile_name_leaves_neither_its_text_nor_its_attribute(name: str) -> None:
    bars = Bars((0.0, 1.0), (1.0,))
    drawings = (
        heat_map(name, [name], [name], {(0, 0): 0.5}),
        line_chart(name, [Series(name, (1.0, 2.0), (1.0, 2.0))], x_name=name, y_name=name),
        two_histograms(name, bars, bars, [0.5], name),
        divided_bar(name, [(name, 1.0)]),
    )
    for drawing in drawings:
        (svg,) = parse(drawing).all("svg")
        assert set(svg.attributes) == {"class", "viewbox", "role", "aria-label"}
        assert svg.attributes["aria-label"].startswith(f"{name}. ")
        assert svg.all("title")[0].text == name
        assert all(element.tag != "script" for element in svg.all())


def test_a_divided_bar_has_the_widths_of_its_parts() -> None:
    parts = [("codes", 60.0), ("scales", 30.0), ("<x>", 10.0)]
    svg = parse(divided_bar("t", parts))
    widths = [float(group.all("rect")[0].attributes["width"]) for group in svg.all("g")]
    assert [width / sum(widths) for width in widths] == pytest.approx([0.6, 0.3, 0.1], abs=1e-3)
    assert [e.text for e in svg.all("text")] == ["codes 60.0 %", "scales 30.0 %", "<x> 10.0 %"]


@given(st.lists(finite, min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_its_values_and_has_round_ticks(values: list[float], from_zero: bool) -> None:
    axis = fit_axis(values, 0.0, 100.0, from_zero=from_zero)
    assert all(-1e-6 <= axis.at(value) <= 100 + 1e-6 for value in values)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(axis.low - 1e-9 * abs(axis.low) <= t <= axis.high + 1e-9 * abs(axis.high) + 1e-12 for t in ticks)
    if from_zero and not axis.is_log:
        assert axis.low <= 0 <= axis.high


@given(positive, st.floats(101, 1e9))
def test_a_logarithmic_axis_begins_and_ends_at_powers_of_ten(low: float, factor: float) -> None:
    axis = fit_axis([low, low * factor], 10.0, 0.0)
    assert axis.is_log
    assert all(
        math.isclose(math.log10(end) % 1, 0, abs_tol=1e-9) or math.isclose(math.log10(end) % 1, 1)
        for end in (axis.low, axis.high)
    )
    assert axis.at(math.sqrt(axis.low * axis.high)) == pytest.approx(5.0)


def test_ticks_are_one_two_or_five_times_a_power() -> None:
    assert Axis(0.0, 10.0, 0, 1).ticks() == [0, 2, 4, 6, 8, 10]
    assert Axis(0.0, 0.03, 0, 1).ticks() == [0, 0.01, 0.02, 0.03]
    assert Axis(1.0, 60.0, 0, 1).ticks() == [20, 40, 60]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.8633, "12.86"), (402000.8, "402,001"), (1234.4, "1,234"), (0.00012345, "0.0001234"),
     (1.5e-7, "1.5e-07"), (math.nan, "–"), (math.inf, "–"), (-3.14159, "-3.142"), (378, "378")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_sizes_and_times_have_the_unit_that_suits_them() -> None:
    assert [num_bytes(v) for v in (12, 2048, 87322432, 3 * 2**30)] == ["12 B", "2.0 KiB", "83.3 MiB", "3.00 GiB"]
    assert [duration(v) for v in (5.04, 125, 7265)] == ["5.0 s", "2.1 min", "2.02 h"]


@pytest.mark.parametrize("largest", [7e-4, 0.0123, 3.2e-5, 123456.0])
def test_numbers_at_the_axis_do_not_run_into_its_name(largest: float) -> None:
    svg = parse(line_chart("t", [Series("a", (1.0, 2.0), (0.1 * largest, largest))], x_name="x", y_name="y"))
    ticks = [e for e in svg.all("text", kind="tick") if e.attributes["text-anchor"] == "end"]
    (name,) = (e for e in svg.all("text", kind="name") if "transform" in e.attributes)
    widest = max(7 * len(e.text) for e in ticks)  # a digit is at most 7 wide in this size
    assert float(ticks[0].attributes["x"]) - widest > float(name.attributes["x"]) + 4
