"""The package as it is installed: the command `dci`, its extras, and what a wheel carries."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
from helpers import ENVIRONMENT, ROOT, ok, refused

from dci.cli.main import PROGRAMS
from ldm import extras
from ldm.extras import EXTRAS

SOURCES = ("ldm", "dci", "configs", "data", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
SHORT = ("training.steps=2", "training.batch_size=2", "validation.every=0", "logging.tensorboard=false")
IN_PYTHON = """
import sys
from dci import Pipeline
image, = Pipeline.load(sys.argv[1])("a V* cat on the beach", n=1, steps=2)
print(image.size)
"""


def dci(*args, code="from dci.cli.main import main; main()", cwd=None):
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_command_lists_its_programs_without_importing_torch():
    code = "from dci.cli.main import main; main(); import sys; assert not {'torch', 'numpy'} & sys.modules.keys()"
    lines = ok(dci("--help", code=code)).splitlines()
    for verb, program in PROGRAMS.items():
        assert any(line.split(None, 1) == [verb, program.summary] for line in lines)


def test_every_program_has_its_verb():
    modules = {file.stem for file in (ROOT / "dci/cli").glob("*.py") if "\ndef main(" in file.read_text()} - {"main"}
    assert {program.module for program in PROGRAMS.values()} == {f"dci.cli.{name}" for name in modules}


def test_a_program_that_there_is_not_is_refused_with_the_nearest():
    refused(dci("smaple"), "smaple", "did you mean 'dci sample'?")
    far = dci("-V")
    refused(far, "no program '-V' (see dci --help)")


TRAIN = ("train", "--config", str(ROOT / "configs/train/ico-tiny.yaml"))
EVALUATE = ("evaluate", "--samples", "A", "--out", "B")
NEEDING = {
    "pytorch_lightning": TRAIN,
    "tensorboard": TRAIN,
    "jinja2": EVALUATE,
    "timm": (*EVALUATE, "--instance", "timm:vit_small_patch16_224.dino"),
    "transformers": (*EVALUATE, "--clip", "transformers:openai/clip-vit-base-patch32"),
    "torch_fidelity": (*EVALUATE, "--kid", "inception"),
    "submitit": ("sweep", "--config", str(ROOT / "configs/sweep/tiny.yaml"), "cluster=slurm"),
    "gradio": ("app",),
    "diffusers": None,  # no program's: tests/diffusers_road
}
"""Package of an extra -> a command that needs it."""


@pytest.mark.slow
@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_extra_is_one_line_that_names_it(package, tmp_path):
    if NEEDING[package] is None:
        return
    code = f"import sys; sys.modules['{package}'] = None; from dci.cli.main import main; main()"
    result = dci(*NEEDING[package], code=code, cwd=tmp_path)
    refused(result, package, f"the extra '{EXTRAS[package]}'", f"pip install '.[{EXTRAS[package]}]' in {ROOT}")
    assert not list(tmp_path.iterdir())


def test_an_installed_package_names_itself(monkeypatch):
    monkeypatch.setattr(extras, "IS_CLONE", False)
    assert extras.how_to_install("timm").endswith("pip install 'dci[eval]'")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that holds the wheel, and this one's packages for what the wheel needs: its folder of programs."""
    place = tmp_path_factory.mktemp("package")
    clone, environment = place / "clone", place / "environment"
    clone.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", place, clone]
    subprocess.run([*pip, *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    programs = environment / ("Scripts" if os.name == "nt" else "bin")
    [packages] = [*environment.glob("lib/python3*/site-packages"), *environment.glob("Lib/site-packages")]
    [wheel] = place.glob("*.whl")
    # pip would take what it finds of this clone, such as its egg-info on PYTHONPATH, for installed.
    install = ["--python", programs / "python", "install", "--ignore-installed", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.mark.slow
def test_a_wheel_learns_and_samples_the_demo_concept_in_another_folder(installed, tmp_path):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}

    def run(program, *args):
        command = [installed / program, *args]
        return ok(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500))

    assert str(installed.parent) in run("python", "-c", "import dci; print(dci.__file__)")
    run("dci", "train", "--config", "configs/train/ico-tiny.yaml", *SHORT)
    [concept] = tmp_path.glob("logs/*/concept.safetensors")
    assert run("python", "-c", IN_PYTHON, concept).strip() == "(64, 64)"
    prompt = ("--prompt", "a V* cat on the beach", "--n-samples", "1", "--steps", "2", "--outdir", "images")
    run("dci", "sample", "--concept", concept, *prompt)
    assert (tmp_path / "images/samples/00000.png").is_file()
