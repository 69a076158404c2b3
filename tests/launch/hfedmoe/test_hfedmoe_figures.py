import itertools
import warnings

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from launch.hfedmoe import client_figures
from launch.hfedmoe import figures as hfedmoe_figures
from launch.hfedmoe.client_figures import client_metric
from launch.hfedmoe.figures import write_figures
from launch.run import figures

OUTCOMES = ("clients_ok", "clients_dropped_out", "clients_over_budget", "clients_nonfinite")


def make_run(rounds=6, clients=6, cohort=3, layers=2, experts=4):
    random = np.random.default_rng(0)
    rows = [
        {
            "round": number,
            "train_loss": 1 / number,
            "validation_accuracy": 1 - 0.5 / number if number % 2 else None,
            "validation_loss": 1.2 / number if number % 2 else None,
            "client_accuracy_mean": 0.5,
            "client_accuracy_std": 0.1,
            "client_accuracy_worst10": 0.3,
            "simulated_time_s": 40.0 * number,
            "round_time_s": 40.0,
            "waiting_share": 0.4,
            "bytes_up": 1_000_000,
            "bytes_down": 3_000_000,
            "union_share": 0.9,
            "trained_share": 0.5,
            "routing_consistency": 0.7,
            "router_entropy": 1.1,
            "dropped_tokens_share": 0.0,
            "clients_ok": cohort,
            "clients_dropped_out": 1,
            "clients_over_budget": 0,
            "clients_nonfinite": 0,
            "wall_s": 1.0,
        }
        for number in range(1, rounds + 1)
    ]
    record = {
        "num_layers": layers,
        "num_experts": experts,
        "device_class": [("phone", "tablet")[client % 2] for client in range(clients)],
        "budget": 1 + np.arange(clients) % 2 * layers,
        "union": random.uniform(1, layers * experts, clients),
        "cohort": np.arange(cohort),
        "usage_before": random.random((cohort, layers, experts)),
        "usage_after": random.random((cohort, layers, experts)),
        "times_chosen": random.integers(0, rounds + 1, (clients, layers, experts)),
        "metric": "accuracy",
        "unit": "passage",
        "client_scores": random.random(clients),
        "client_num_examples": random.integers(1, 500, clients),
        "expert_load": np.full((layers, experts), 1 / experts),
        "round_last": rounds,
        "baseline": 0.2,
        "baseline_name": "majority class",
    }
    return rows, record


def without_measurements(run):
    rows, record = run
    rows = [
        {
            name: (value if name == "round" else (None, float("nan"))[row["round"] % 2])
            for name, value in row.items()
        }
        for row in rows
    ]
    floats = ("union", "usage_before", "usage_after", "client_scores", "expert_load")
    return rows, record | {name: np.full_like(record[name], np.nan) for name in floats} | {"baseline": np.nan}


@pytest.mark.parametrize(
    "run",
    [
        make_run(),
        make_run(rounds=1, clients=1, cohort=1, layers=1),
        make_run(rounds=1, clients=2, cohort=0),
        make_run(rounds=70, clients=200, cohort=60, layers=3, experts=64),
        without_measurements(make_run()),
        without_measurements(make_run(rounds=1, clients=1, cohort=1)),
    ],
    ids=["usual", "one of each", "empty cohort", "large", "nothing measured", "one and nothing measured"],
)
def test_every_figure_is_drawn_without_a_warning(tmp_path, run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = write_figures(*run, tmp_path / "figures")
    assert len({entry.path for entry in entries}) == len(entries) == 9
    assert all(entry.title and entry.caption for entry in entries)
    for entry in entries:
        with Image.open(entry.path) as image:
            assert image.format == "PNG" and image.width == figures.WIDTH_IN * figures.DOTS_PER_INCH
            assert len(image.convert("L").getcolors(256)) > 2  # not blank


def test_names_are_drawn_as_text_and_no_formula(tmp_path):
    rows, record = make_run()
    names = [("$x_{$", "<script>&")[client % 2] for client in range(6)]
    drawn = write_figures(rows, record | {"device_class": names}, tmp_path)
    assert all(entry.path.stat().st_size for entry in drawn)


def test_no_tick_of_an_axis_is_a_formula():
    rows, record = make_run()
    record["client_num_examples"] = np.array([1, 5, 40, 300, 2000, 100_000])
    with figures.house_style():
        figure = client_metric(record)
        figure.canvas.draw()
        labels = [text.get_text() for text in figure.axes[1].get_xticklabels(which="both")]
    ticks = [float(label) for label in labels if label]
    round_numbers = {float(f"{digit}e{power}") for digit in (1, 2, 5) for power in range(-3, 8)}
    assert len(ticks) >= 2 and set(ticks) <= round_numbers


def test_figures_depend_on_the_data(tmp_path):
    rows, record = make_run()
    other = [row | {"train_loss": 2.0, "bytes_up": 2_000_000} for row in rows]
    first, second = (
        write_figures(data, record, tmp_path / name) for data, name in ((rows, "a"), (other, "b"))
    )
    changed = {
        a.path.name for a, b in zip(first, second, strict=True) if a.path.read_bytes() != b.path.read_bytes()
    }
    assert changed == {"learning.png", "learning_time.png", "cost.png"}


def test_a_device_class_looks_alike_in_every_run():
    """Whatever other classes there are, and whatever their budgets."""
    _, record = make_run()
    other = record | {"device_class": ["tablet", "nano"] * 3, "budget": record["budget"][::-1]}
    looks = [
        {name: look for name, _, look in client_figures._device_classes(each, np.full(6, True))}
        for each in (record, other)
    ]
    assert looks[0]["tablet"] == looks[1]["tablet"] != looks[0]["phone"]
    assert figures.looks_of(["nano"])["nano"] == looks[1]["nano"]


def test_no_two_device_classes_of_a_run_look_the_same():
    names = ["phone", "tablet", "laptop", *(f"class {number}" for number in range(40))]
    found = figures.looks_of(names)
    assert len({tuple(look.values()) for look in found.values()}) == len(names)
    assert figures.looks_of(["phone"])["phone"] == found["phone"]


@pytest.mark.parametrize("clients", [6, 200])
def test_up_to_six_device_classes_have_colours_and_marks_of_their_own(clients):
    """Also where clients are shown by their distribution; none has the colour of reference lines."""
    for names in (["low", "mid", "high"], ["phone", "tablet", "laptop", "watch", "tv", "car"]):
        looks = figures.looks_of(names)
        assert len({look["color"] for look in looks.values()} - {figures.GREY}) == len(names)
        assert figures.looks_of(reversed(names)) == looks
        _, record = make_run(clients=clients)
        record["device_class"] = [names[client % len(names)] for client in range(clients)]
        for draw in (hfedmoe_figures.client_metric, hfedmoe_figures.budget_union):
            axes = draw(record).axes[0]
            handles, labels = axes.get_legend_handles_labels()
            for name, look in looks.items():
                (handle,) = (h for h, label in zip(handles, labels, strict=True) if label.startswith(name))
                color = handle.get_color() if clients >= figures.MANY else handle.get_facecolor()[0]
                assert matplotlib.colors.to_hex(color) == look["color"].lower()
                if clients >= figures.MANY:
                    assert handle.get_marker() == look["marker"]


def test_of_coinciding_curves_both_are_seen():
    """The later one is thinner, or has gaps."""
    rows, record = make_run()
    rows = [
        row | {"validation_document_accuracy": row["validation_accuracy"], "trained_share": 0.9}
        for row in rows
    ]
    for figure in (hfedmoe_figures.by_round(rows, record), hfedmoe_figures.expert_share(rows)):
        for axes in figure.axes:
            curves = [curve for curve in axes.lines if len(curve.get_xdata()) > 2]
            for earlier, later in itertools.pairwise(curves):
                assert later.get_linewidth() < earlier.get_linewidth()


def test_reference_lines_are_where_they_should_be():
    rows, record = make_run(experts=8)
    left, _ = hfedmoe_figures.by_round(rows, record).axes
    (line,) = (line for line in left.lines if line.get_label() == "majority class, test split")
    assert set(line.get_ydata()) == {0.2}
    entropy = next(
        axes for axes in hfedmoe_figures.routing(rows, record).axes if "entropy" in axes.get_ylabel()
    )
    (line,) = (line for line in entropy.lines if line.get_label() == "undecided: ln 8 = 2.08")
    np.testing.assert_allclose(line.get_ydata(), np.log(8))


def test_ticks_of_the_load_are_true_values():
    rows, record = make_run(experts=8)  # a share of 12.5%
    figure = hfedmoe_figures.routing(rows, record)
    figure.canvas.draw()
    (bar,) = (axes for axes in figure.axes if axes.get_ylabel() == "tokens of the layer")
    for value, label in zip(bar.get_yticks(), bar.get_yticklabels(), strict=True):
        assert float(label.get_text().removesuffix("%")) == pytest.approx(100 * value)
    np.testing.assert_allclose(bar.get_ylim(), [0, 0.125])


@pytest.mark.parametrize("clients", [figures.MANY - 1, figures.MANY])
def test_many_clients_are_shown_by_their_distribution(clients):
    _, record = make_run(clients=clients, cohort=clients)
    many = clients >= figures.MANY
    for draw in (hfedmoe_figures.client_metric, hfedmoe_figures.budget_union):
        marks = [
            mark for axes in draw(record).axes for mark in axes.collections if len(mark.get_offsets()) > 5
        ]
        assert bool(marks) != many
    images = [image for axes in hfedmoe_figures.expert_usage(record).axes for image in axes.images]
    assert bool(images) != many


def test_the_boxes_are_quantiles_of_the_clients():
    _, record = make_run(clients=200)
    (axes,) = hfedmoe_figures.budget_union(record).axes
    phones = record["union"][::2]
    medians = [curve.get_ydata()[0] for curve in axes.lines if len(curve.get_xdata()) == 1]
    assert np.median(phones) in medians and np.median(record["union"][1::2]) in medians


def test_labels_are_text_and_no_formulas(tmp_path):
    rows, record = make_run()
    write_figures(rows, record | {"device_class": ["$x_{$", "a$b"] * 3}, tmp_path)


def test_matplotlib_is_left_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    write_figures(*make_run(rounds=2), tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in vars(figures).values()


def test_line_leaves_gaps_out_and_joins_the_rest():
    _, ((axes,),) = figures.new_figure()
    figures.line(axes, np.arange(4.0), np.array([1.0, np.nan, 3.0, np.nan]), "some", figures.BLUE)
    figures.line(axes, np.arange(4.0), np.full(4, np.nan), "none", figures.BLUE)
    (curve,) = axes.get_lines()
    np.testing.assert_array_equal(curve.get_xydata(), [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([30.0], (1.0, "s")), ([119.0], (1.0, "s")), ([120.0, np.nan], (60.0, "min")), ([], (1.0, "s"))],
)
def test_time_scale(seconds, expected):
    assert figures.time_scale(np.array(seconds)) == expected


def test_a_work_directory_that_was_removed_is_not_made_again(tmp_path):
    """Figures alone in it would have the next run refused."""
    with pytest.raises(FileNotFoundError, match="figures"):
        write_figures(*make_run(rounds=2), tmp_path / "removed" / "figures")
    assert not list(tmp_path.iterdir())
