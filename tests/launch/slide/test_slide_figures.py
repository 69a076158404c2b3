import warnings

import numpy as np
import pytest
from PIL import Image

from launch.run import figures
from launch.slide.figures import write_figures
from launch.slide.sweeps import Study, UserTimeline
from slide_jax.experiment import Latencies
from slide_jax.solvers import sweep_solvers

NAMES = (
    "timeline",
    "served_by_rho",
    "served_by_bandwidth",
    "served_by_deadline",
    "served_by_users",
    "latency_cdf",
    "gap",
)
TEXTS = {name: (f"title of {name}", "caption") for name in NAMES}
USER = UserTimeline(
    arrival_s=np.array([1.0, 2.0]),
    slide_begin_s=np.array([1.0, 2.0]),
    slide_end_s=np.array([2.0, 3.0]),
    dai_begin_s=np.array([2.0, 3.0]),
    dai_end_s=np.array([3.0, 4.0]),
    start_s=0.0,
    deadline_s=4.5,
)


def make_study(points=4, drops=20, known=True) -> Study:
    random = np.random.default_rng(0)

    def rows(name: str, values: np.ndarray) -> list[dict]:
        row = {"bandwidth_hz": 1e8, "patience": 1.0, "users": 9, "rho": 0.6 if known else np.nan}
        row |= {"latency_saved": 0.3, "latency_saved_ci95": 0.01} if known else {"latency_saved": np.nan}
        row |= {"users_gained": 0.4, "users_gained_ci95": 0.02} if known else {"users_gained": np.nan}
        for solver in sweep_solvers():
            row |= {f"served_{solver}": 5.0 * known, f"served_{solver}_ci95": 0.1 if known else np.nan}
        return [row | {name: value} for value in values]

    sweeps = {
        "bandwidth": rows("bandwidth_hz", np.linspace(1e7, 3e8, points)),
        "patience": rows("patience", np.linspace(0.5, 2, points)),
        "users": rows("users", np.arange(1, points + 1)),
        "rho": rows("rho", np.geomspace(0.1, 3, points) if known else np.full(points, np.nan)),
    }
    served = {solver: random.integers(2, 6, drops) * known for solver in sweep_solvers()}
    served["exact"] = np.full(drops, 6 * known)
    dai_s = random.uniform(2, 8, (drops, 9)) if known else np.full((drops, 9), np.nan)
    return Study(sweeps, served, Latencies(dai_s, 0.6 * dai_s, 0.7 * np.ones_like(dai_s)))


@pytest.mark.parametrize(
    ("study", "user"),
    [
        (make_study(), USER),
        (make_study(points=1, drops=2), USER._replace(arrival_s=np.zeros(2))),
        (make_study(known=False), None),
    ],
    ids=["usual", "one of each", "nobody served"],
)
def test_every_figure_is_drawn_without_a_warning(tmp_path, study, user):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = write_figures(study, user, TEXTS, tmp_path / "figures")
    assert [entry.path.stem for entry in entries] == list(NAMES)
    assert [entry.title for entry in entries] == [f"title of {name}" for name in NAMES]
    for entry in entries:
        with Image.open(entry.path) as image:
            assert image.format == "PNG" and image.width == figures.WIDTH_IN * figures.DOTS_PER_INCH
            assert len(image.convert("L").getcolors(256)) > 2  # not blank


def test_only_figures_with_a_text_are_drawn(tmp_path):
    """A scenario of one's own has neither a gap over drops nor a sweep of deadlines."""
    study = make_study()
    study = Study({"bandwidth": study.sweeps["bandwidth"]}, {}, study.latencies)
    wanted = {name: TEXTS[name] for name in ("timeline", "served_by_bandwidth", "latency_cdf")}
    write_figures(study, USER, wanted, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(wanted)


def test_figures_depend_on_the_data(tmp_path):
    study = make_study()
    other = study._replace(served=study.served | {"relaxed": np.zeros(20, int)})
    first, second = (
        write_figures(data, user, TEXTS, tmp_path / name)
        for data, user, name in ((study, USER, "a"), (other, USER._replace(deadline_s=9.0), "b"))
    )
    changed = {
        a.path.stem for a, b in zip(first, second, strict=True) if a.path.read_bytes() != b.path.read_bytes()
    }
    assert changed == {"gap", "timeline"}


@pytest.mark.parametrize(("arrival_s", "rho"), [([1.0, 2.0], 1.0), ([0.0, 0.0], np.inf)])
def test_rho_of_a_time_line(arrival_s, rho):
    assert USER._replace(arrival_s=np.array(arrival_s)).rho == rho
