"""What a user gets wrong: exit code 2, one line that names field, value and remedy, nothing written."""

import json

import pytest
import slide_run
import tiny_run

USER = {
    "task": "vision",
    "deadline_s": 2.0,
    "spectral_efficiency_bps_hz": 4.0,
    "device": {"f_min_hz": 3e8, "f_max_hz": 1e9, "flop_per_cycle": 100},
}
SCENARIO = {
    "bandwidth_hz": 1e8,
    "models": [{"name": "m", "task": "vision", "accuracy": 0.8, "layers": [{"bits": 1e6, "flop": 1e8}]}],
    "users": [USER],
}


def refusal(tmp_path, extra=(), **fields) -> str:
    """Returns the line that refuses these fields."""
    return tiny_run.refusal([*slide_run.arguments(tmp_path / "a" / "run", **fields), *extra], tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("solver", "exat", "='exat': unknown name; did you mean 'exact'?"),
        ("left_over", "minmax", "='minmax': unknown name; did you mean 'min_max'?"),
        ("seed", -1, "=-1: must be a number from 0 to"),
        ("setting.rate_model", "shanon", "='shanon': unknown name; did you mean 'shannon'?"),
        ("setting.models", "resnet5", "='resnet5': unknown name; did you mean 'resnet50'?"),
        ("setting.models", "gpt2,gpt3", "='gpt3': unknown name; did you mean 'gpt2'?"),
        ("setting.models", "gpt2,gpt2", "=('gpt2,gpt2',): gpt2 comes twice; name each model once"),
        ("setting.models", "()", "=(): the catalogue is empty; name some of resnet50, "),
        ("setting.models", "switch_classifier", "='switch_classifier': unknown name; "),
        ("setting.users", 0, "=0: must be a number from 1 to 1e+07; use e.g. 50"),
        ("setting.bandwidth_hz", -1.0, "=-1.0: must be a number from 0 to 1e+15; use e.g. 1e+08"),
        ("setting.bandwidth_hz", "nan", "=nan: must be a number from 0"),
        ("setting.bandwidth_hz", "inf", "=inf: must be a number from 0"),
        ("setting.deadline_min_s", 0.0, "=0.0: must be a number above 0 and below 1e+09; use e.g. 2"),
        ("setting.deadline_min_s", 9.0, "=9.0: above setting.deadline_max_s=8.0; give at most"),
        ("setting.compute_max", 1.0, "=1.0: must be a number above 0 and below 1; use e.g. 0.55"),
        ("setting.compute_min", 0.6, "=0.6: above setting.compute_max=0.55; "),
        ("setting.accuracy_max", 1.5, "=1.5: must be a number from 0 to 1; "),
        ("setting.f_min_hz", 2e9, "=2000000000.0: above setting.f_max_hz=1300000000.0; "),
        ("setting.kappa_j_per_hz2_cycle", -1e-28, "=-1e-28: must be a number from 0"),
        ("setting.bits_per_parameter", 0.0, "=0.0: must be a number above 0"),
        ("cell.radius_m", 5.0, None),
        ("cell.shadowing_db", -8.0, "=-8.0: must be a number from 0 to 50; "),
        ("cell.rician_k", "nan", "=nan: must be a number from 0"),
        ("monte_carlo.drops", 1, "=1: must be a number from 2 to 1e+06; "),
        ("monte_carlo.drops", 1000000, None),
        ("monte_carlo.patience", "()", "=(): must have 1 to 100 points; give e.g. (0.8, 1.6)"),
        ("monte_carlo.rhos", "(0.5,0)", "=(0.5, 0): must be a number above 0"),
        ("monte_carlo.rhos", "(0.5,'x')", "=(0.5, 'x'): must be a number above 0"),
        ("monte_carlo.user_counts", "(5.5,)", "=(5.5,): must be a whole number from 1"),
        ("monte_carlo.bandwidth_factors", -1, "=(-1,): must be a number above 0"),
        ("milp.time_limit_s", 0.0, "=0.0: must be a number above 0"),
    ],
)
def test_a_bad_value_is_refused_by_name(tmp_path, field, value, line):
    found = refusal(tmp_path, **{field.replace(".", "__"): value, "monte_carlo__users": 20})
    if field == "cell.radius_m":
        line, field = "=10.0: above cell.radius_m=5.0; give at most cell.radius_m", "cell.minimum_distance_m"
    if value == 1000000:
        line = "=1000000: with 20 users a drop more than 1e+07 users at a point; give at most 500000"
    assert found.startswith(f"error: {field}{line}")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"bandwidth_hz": -1.0}, "bandwidth_hz=-1.0: must be a finite number, 0 or more; "),
        ({"bandwith_hz": 1.0}, "bandwith_hz=1.0: unknown key; did you mean 'bandwidth_hz'?"),
        ({"users": [{**USER, "deadline_s": -2.0}]}, "users[0].deadline_s=-2.0: must be a finite number"),
        ({"users": [USER, {**USER, "task": "visoin"}]}, "users[1].task='visoin': unknown name; did you"),
        ({"models": []}, "models=[]: the catalogue is empty; "),
        ({"rate_model": "shannon"}, "users[0].snr_hz=None: is missing; "),
    ],
)
def test_a_bad_scenario_is_refused_with_its_path(tmp_path, change, line):
    path = tmp_path / "cell.json"
    path.write_text(json.dumps(SCENARIO | change))
    assert refusal(tmp_path, scenario__path=path).startswith(f"error: {line}")


def test_a_file_that_is_no_scenario_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path, scenario__path=tmp_path / "none.json")
    (tmp_path / "cell.json").write_text("{")
    assert "is no JSON file" in refusal(tmp_path, scenario__path=tmp_path / "cell.json")


def test_an_unknown_field_is_refused_with_the_nearest(tmp_path):
    line = refusal(tmp_path, extra=["--config.setting.user=3"])
    assert line == "error: setting.user='3': unknown config field; did you mean setting.users?"


def test_a_workdir_of_another_config_is_refused_and_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 7}')
    screen = tiny_run.run_main(slide_run.arguments(tmp_path))
    (line,) = screen.err.splitlines()
    assert screen.code == 2 and "give that value again, or another --workdir" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]
