"""What the documentation shows is true: its code runs, its commands are valid, its tables are complete."""

import importlib
import json
import operator
import pathlib
import re
import runpy
import shlex

import pytest
import slide_run
import tiny_run
from test_configs import fields

import slide_jax
from configs import hfedmoe, slide
from hfedmoe_jax.algorithms import algorithms
from hfedmoe_jax.ranges import RANGES
from launch.main import main
from launch.run.command import read_command
from slide_jax.profiles import PROFILES
from slide_jax.settings import sample_drop
from slide_jax.solvers import sweep_solvers

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SCENARIOS = sorted((ROOT / "examples").glob("*.json"))
QUOTE = re.compile(r"# (examples/\w+\.py)\n(.*)", re.DOTALL)
COMMAND = re.compile(r"python -m launch\.main ((?:.*\\\n)*.*)")
BUILT_IN = [name for name in algorithms if algorithms[name].__module__.startswith("hfedmoe_jax.")]
PACKAGE_NAME = re.compile(r"`((?:hfedmoe|slide)_jax\.[a-z_0-9.]+)`")


def blocks(language: str) -> list:
    """Returns the fenced blocks of a language on all pages, equal ones once, named by page and number."""
    places = {
        text: f"{name}-{number}"
        for name, page in TEXTS.items()
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL), 1)
    }
    return [pytest.param(text, id=place) for text, place in places.items()]


@pytest.fixture
def solvers_restored():
    """Removes the solvers that an example adds."""
    before = dict(slide_jax.SOLVERS)
    yield
    slide_jax.SOLVERS.clear()
    slide_jax.SOLVERS.update(before)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_is_a_quoted_example_or_runs(text, monkeypatch):
    quote = QUOTE.fullmatch(text)
    if quote:
        assert quote[2] == (ROOT / quote[1]).read_text(encoding="utf-8")
    else:
        monkeypatch.chdir(ROOT)
        exec(text, {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, capsys, solvers_restored):
    if "def get_config" in path.read_text(encoding="utf-8"):
        assert main(tiny_command(path, tmp_path)) == 0
        assert (tmp_path / "run" / "report.html").exists()
    else:
        runpy.run_path(str(path), run_name="__main__")
        assert capsys.readouterr().out


def tiny_command(path: pathlib.Path, directory: pathlib.Path) -> list[str]:
    """Returns the command that runs the smoke preset of a config file at a still smaller size."""
    command = [f"--config={path}:smoke"]
    config, *_ = read_command(command)
    if config.experiment == "slide":
        return command + slide_run.arguments(directory / "run")[1:]
    texts = tiny_run.write_jsonl(directory / "texts.jsonl", tiny_run.texts(60))
    return command + tiny_run.arguments(directory / "run", texts, model__num_layers=1, fl__rounds=1)[1:]


def test_the_new_solver_is_in_the_sweeps_and_serves_at_most_the_optimum(solvers_restored):
    config, *_ = read_command([f"--config={ROOT}/examples/solver.py:smoke"])
    problem = sample_drop(config)
    allocation = slide_jax.solve(problem, "undemanding_first")
    assert "undemanding_first" in sweep_solvers()
    assert slide_jax.verify(problem, allocation) == []
    assert 0 < allocation.throughput <= slide_jax.solve(problem).throughput


@pytest.mark.parametrize("name", ["selector", "aggregation_rule", "solver"])
def test_a_new_part_is_at_most_twenty_lines(name):
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("text", [*blocks("json"), *(path.read_text(encoding="utf-8") for path in SCENARIOS)])
def test_scenarios_can_be_solved(text):
    problem = slide_jax.read_scenario(json.loads(text))
    allocation = slide_jax.solve(problem)
    assert allocation.throughput > 0
    assert slide_jax.verify(problem, allocation) == []


def commands() -> list[str]:
    """Returns the arguments of `launch.main` in all shell blocks and in the examples' docstrings."""
    texts = [block.values[0] for block in blocks("bash")]
    texts += [path.read_text(encoding="utf-8") for path in EXAMPLES]
    return sorted({command for text in texts for command in COMMAND.findall(text)})


@pytest.mark.parametrize("command", commands())
def test_commands_are_valid(command, monkeypatch, solvers_restored):
    monkeypatch.chdir(ROOT)
    command = re.sub(r"\$\w+", "1", command.replace("\\\n", " "))
    config, *_ = read_command(shlex.split(command, comments=True))
    assert config.experiment in ("hfedmoe", "slide")


@pytest.mark.parametrize(("config", "place"), [(hfedmoe, 0), (slide, 2)], ids=["hfedmoe", "slide"])
def test_every_config_field_is_documented_with_its_default(config, place):
    page = TEXTS["docs/config.md"].partition("\n## SLIDE\n")[place]
    documented = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \| ", page, re.MULTILINE))
    config = config.get_config()
    names = {name for name in fields(config) if not name.startswith("devices.")}
    assert {name: shown(operator.attrgetter(name)(config)) for name in names}.items() <= documented.items()


def shown(value) -> str:
    """Returns a default as the table of config fields writes it."""
    if isinstance(value, tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "–"


def test_every_range_is_documented():
    documented = re.findall(
        r"^\| `([\w.]+)` \| ((?:at least|above).*) \|$", TEXTS["docs/config.md"], re.MULTILINE
    )
    assert documented == [(field, str(allowed)) for field, allowed in RANGES.items()]


def test_every_field_of_a_device_is_documented():
    for device in hfedmoe.get_config().devices.values():
        for name in device:
            assert f"`devices.NAME.{name}`" in TEXTS["docs/config.md"]


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/running.md", hfedmoe.PRESETS),
        ("docs/slide.md", slide.PRESETS),
        ("docs/slide.md", slide_jax.SOLVERS),
        ("docs/slide.md", PROFILES),
        ("docs/algorithms.md", BUILT_IN),
    ],
)
def test_every_name_is_documented(page, names):
    assert [name for name in names if f"`{name}`" not in TEXTS[page]] == []


@pytest.mark.parametrize(
    "name", sorted({name for text in TEXTS.values() for name in PACKAGE_NAME.findall(text)})
)
def test_every_function_that_the_pages_name_exists(name):
    package, *parts = name.split(".")
    module = importlib.import_module(package)
    for position, part in enumerate(parts):
        if not hasattr(module, part):
            importlib.import_module(".".join([package, *parts[: position + 1]]))
        module = getattr(module, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150
