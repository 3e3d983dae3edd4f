"""The documentation: links, snippets, examples, --help, and names of tests and modules."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src(?:set)?="([^"]+)"', prose):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        destination = (page.parent / file).resolve() if file else page
        assert destination.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in headings(destination), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_are_there(page):
    for file, _, name in re.findall(r"`(tests/[\w/]+\.py)(::(\w+))?`", page.read_text()):
        assert (ROOT / file).is_file(), f"{page.name}: {file}"
        assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{page.name}: {file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_commands_name_are_there(page):
    import importlib.util

    for module in set(re.findall(r"python -m ((?:controlnet|cnkernels|benchmarks|tests)[\w.]*)", page.read_text())):
        assert importlib.util.find_spec(module), f"{page.name}: python -m {module}"


def commands() -> list[str]:
    """The modules that a page or the Makefile starts by `python -m` or torchrun."""
    text = "\n".join(page.read_text() for page in [*PAGES, ROOT / "Makefile"])
    return sorted(set(re.findall(r"-m ((?:controlnet|cnkernels|benchmarks|tests)[a-z_.]*[a-z])", text)))


class Parsed(Exception):
    """The command line was understood."""


def arguments_of(module: str, words: list[str], monkeypatch) -> None:
    """Starts a module with these words, as far as its parser. Raises SystemExit for what it does not understand."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patched.setattr(sys, "argv", [module, *words])
        patched.chdir(ROOT)
        runpy.run_module(module, run_name="__main__", alter_sys=False)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", commands())
def test_help_has_an_example_that_the_command_understands(module, monkeypatch, capsys):
    try:
        arguments_of(module, ["--help"], monkeypatch)
    except SystemExit as end:  # torch's @record swallows it
        assert end.code == 0
    shown = capsys.readouterr().out.partition("example")[2].replace("\\\n", " ")
    examples = re.findall(rf"-m {re.escape(module)}(?![\w.])([^|>\n]*)", shown)
    assert examples, f"{module} --help has no example"
    for example in examples:
        with pytest.raises(Parsed):
            arguments_of(module, shlex.split(example), monkeypatch)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(example, tmp_path):
    if example.name != "kernels.py":
        pytest.importorskip("diffusers")
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_scheme_of_the_network_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "images" / "network.py"))
    for name, theme in script["THEMES"].items():
        drawn = (ROOT / "docs" / "images" / f"network-{name}.svg").read_text(encoding="utf-8")
        assert drawn == script["draw"](theme), "python docs/images/network.py"


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_s_kernels_run():
    [snippet] = [text for text in snippets(ROOT / "README.md") if "import cnkernels" in text]
    names: dict = {}
    exec(snippet, names)
    assert torch.equal(names["z"], names["x"])  # a zero convolution adds nothing yet
    assert names["out"].shape == (2, 256, 8, 40) and names["g"].shape == (2, 256, 1280)


def test_the_readme_s_line_for_diffusers_runs(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from tests.controlnet import diffusers_models as models

    [snippet] = [text for text in snippets(ROOT / "README.md") if "the line" in text]
    pipe = models.pipeline()
    kind = type(pipe)
    call = kind.__call__
    asked = []

    def with_states(self, prompt, image):
        asked.append(prompt)
        return call(self, image=image, num_inference_steps=1, output_type="np", **models.prompt())

    monkeypatch.setattr(diffusers.ControlNetModel, "from_pretrained", lambda name, **options: pipe.controlnet)
    monkeypatch.setattr(kind, "from_pretrained", lambda name, controlnet, **options: pipe)
    monkeypatch.setattr(kind, "to", lambda self, device: self)
    monkeypatch.setattr(kind, "__call__", with_states)
    names = {"segmentation_map": models.image()}
    exec(snippet, names)
    assert asked == ["a street at night"] and names["image"].shape == (64, 64, 3)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_both_packages_have_the_distribution_s_version():
    import tomllib

    import cnkernels
    import controlnet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cnkernels.version.__version__"}
    assert cnkernels.__version__ == controlnet.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", cnkernels.__version__)
    assert (ROOT / "README.md").read_text().startswith(f"# {project['project']['name']}\n")


def test_nothing_advises_to_install_a_name_that_nobody_published():
    folders = ("cnkernels", "controlnet", "benchmarks", "docs", "examples")
    files = [*ROOT.glob("*.md"), *(file for folder in folders for file in (ROOT / folder).rglob("*.[pm][yd]"))]
    assert len(files) > 100
    for file in files:
        advised = re.search(r"pip install (-\S+ )*['\"]?(cnkernels|controlnet)\b", file.read_text(encoding="utf-8"))
        assert advised is None, f"{file.relative_to(ROOT)}: {advised[0]}"
