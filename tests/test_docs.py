"""README and docs: every relative link leads somewhere, every command and call is one that the programs understand."""

import argparse
import ast
import importlib
import inspect
import re
import runpy
import shlex
import sys

import published
import pytest
from helpers import ROOT

from dci import Pipeline
from dci.cli.arguments import Parser
from dci.cli.main import PROGRAMS
from dci.diffusers import DCIPipeline
from dci.dual_branch.options import DUAL_BRANCH
from dci.experiments.suite import load_suite
from dci.finetuning.config_files import finetune_config
from dci.pipeline import OPTIONS
from ldm.errors import UserError

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "data").glob("*/README.md"))
UNLED = [page for page in PAGES if page.is_relative_to(ROOT / "docs/results-tiny")]
"""The only pages of docs that need not begin with a command: reports of what was run."""
FOREIGN = [
    "tensorboard",
    "git",
    "hf",
    "gdown",
    "unzip",
    "scp",
    "cat",
    "printf",
    "squeue",
    "sinfo",
    "scancel",
    "source",
    "python3",
    "cd",
    "pre-commit",
    "ruff",
    "cc101",
    "tar",
    "for",
    "do",
    "done",
]
"""Commands of a page that are not ours."""


class Parsed(Exception):
    """A program's arguments were understood; it shall not run."""


def named(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        place, _, heading = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = page.parent / place if place else page
        assert target.exists(), f"{named(page)} links to {link}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", [p for p in PAGES if p.is_relative_to(ROOT / "docs") and p not in UNLED], ids=named)
def test_a_page_begins_with_its_commonest_command(page):
    beginning = page.read_text(encoding="utf-8").split("\n## ")[0]
    assert re.findall(r"^```(\w*)$", beginning, re.M)[:1] in (["bash"], ["python"])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def commands(page):
    """The commands of a page: lines of its blocks, and what it has as code within its text if that has arguments."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    blocks = [content for language, content in blocks if language in ("", "bash", "sh")]
    blocks += re.findall(r"^ {4}((?:dci|python|bash|sbatch|pip) .*)$", text, re.M)
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    ours = r"(?:\w+=\S+ )*(?:dci|python|bash|sbatch|pip|[\w./]*\w\.py) .*"
    lines = [" ".join(code.split()) for code in inline if re.fullmatch(ours, code, re.S)]
    for block in blocks:
        lines += re.sub(r"\\\n", " ", block).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words_of(line):
    """The words of each command of a line; comments, variables, functions and redirections do not count.

    What a synopsis has in brackets counts, and a value stands in where it only says what kind belongs there.
    """
    line = re.sub(r"\[(--[^]]+)\]", r"\1", line)
    line = re.sub(r"\b(?:FORMAT|R)\b", lambda found: {"FORMAT": "lora", "R": "4"}[found.group()], line)
    line = re.sub(r"^\s*\w+\(\) \{|\}\s*(#.*)?$", "", line)
    line = re.sub(r"\$\w+", "1", re.sub(r"\w+=\$\((.*)\)", r"\1", line))
    for words in _split(shlex.split(line, comments=True)):
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words


def _split(words):
    commands = [[]]
    for word in words:
        if word in ("|", "&&", "||", ";"):
            commands.append([])
        elif word.endswith(";"):
            commands[-1].append(word[:-1])
            commands.append([])
        elif word not in ('"$@"', "$@"):
            commands[-1].append(word)
    return commands


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Stand-ins for the data sets that the pages download, under the names that they have there."""
    folder = tmp_path_factory.mktemp("datasets")
    published.dreambench(folder / "dreambooth")
    published.customconcept101(folder / "custom-diffusion/customconcept101")
    return folder


@pytest.fixture
def load(datasets, tmp_path, monkeypatch):
    """Build the suite of a command's configuration and overrides, in a folder that has the data sets."""

    def run(config, overrides):
        monkeypatch.chdir(datasets)
        suite = load_suite(ROOT / config, [*overrides, f"outdir={tmp_path}"])
        concept = ["data.images=FOLDER", "concept.class_noun=dog"]
        for method in suite.methods:
            finetune_config(method.config, [*suite.training, *method.training, *concept])

    return run


@pytest.fixture
def parse(monkeypatch):
    """Call a program up to the point where its arguments are parsed."""
    for kind in (argparse.ArgumentParser, Parser):
        parse_args = kind.parse_args

        def stop(self, args=None, namespace=None, parse_args=parse_args):
            parse_args(self, args, namespace)
            raise Parsed

        monkeypatch.setattr(kind, "parse_args", stop)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(program, args):
        monkeypatch.setattr(sys, "argv", [str(program), *args])
        with pytest.raises(Parsed):
            if program in PROGRAMS:
                importlib.import_module(PROGRAMS[program].module).main()
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")

    return run


def check(words, parse, load):
    """Fail for a command that would be refused: a program, option, file, test or extra that there is not."""
    head, *args = words
    for word in args:
        if re.match(r"(?:configs|data|scripts|tests|benchmarks)/[\w./-]+$", word):
            assert (ROOT / word).exists(), word
    if head == "dci":
        if args[0] not in ("--help", "--version", "PROGRAM", "VERB"):
            assert args[0] in PROGRAMS, args[0]
            understood(args[0], args[1:], parse, load)
    elif head == "python" and args[0] == "-m":
        assert args[1] in ("pytest", "mypy", "dci")
    elif head == "python":
        if "Parser(" in (ROOT / args[0]).read_text() + ("Parser(" if "scripts/" in args[0] else ""):
            understood(args[0], args[1:], parse, load)
    elif head.endswith(".py"):
        understood(f"scripts/{head.removeprefix('scripts/')}", args, parse, load)
    elif head == "bash":
        assert (ROOT / args[0]).is_file()
    elif head == "sbatch":
        [place] = [i for i, word in enumerate(args) if word.endswith(".sbatch")]
        many = args[place].endswith("train_many.sbatch")  # takes a list of concepts, and hands on the rest
        script = "train_ico" if many else args[place].partition("slurm/")[2].removesuffix(".sbatch")
        args = args[place + 1 :] if not many else [*args[place + 2 :], "concept.class_noun=dog", "data.images=FOLDER"]
        understood(f"scripts/{script}.py", args, parse, load)
    elif head == "pip":
        wanted = [extra for found in re.findall(r"\[([\w,]+)\]", " ".join(args)) for extra in found.split(",")]
        section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        assert all(re.search(rf"^{extra} = \[", section, re.M) for extra in wanted), args
    else:
        assert head in FOREIGN, head


def understood(program, args, parse, load):
    """Parse a program's arguments, and build the configuration of a training or a suite."""
    if args:  # a program alone is only named
        parse(program, args)
    if "--config" in args:
        config = args[args.index("--config") + 1]
        overrides = [word for word in args if re.match(r"[a-z_]+(\.\w+)*=", word)]
        if program in ("train", "scripts/train_ico.py"):
            finetune_config(ROOT / config, overrides)
        elif program in ("sweep", "compare", "scripts/sweep.py", "scripts/compare.py") and config.startswith("configs/"):
            load(config, overrides)


CASES = [pytest.param(line, id=f"{named(page)}: {line[:60]}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", CASES)
def test_every_command_is_understood(line, parse, load):
    for words in words_of(line):
        check(words, parse, load)


@pytest.mark.parametrize(
    "line",
    [
        "sample_dci.py --concept FILE --prompt TEXT --agg-tme 0.3",
        "dci export CONCEPT --to FORMAT [--rnk R]",
        "dci compare --config configs/eval/tiny.yaml n_smples=4",
        "dci sweep --config configs/eval/tiny.yaml 'training=[training.stps=4]'",
        "dci compare --config configs/eval/dreambench.yaml dataset.folder=dreambooth dataset.frst=1",
    ],
)
def test_a_command_with_a_mistake_is_not_understood(line, parse, load):
    with pytest.raises((UserError, SystemExit)):
        for words in words_of(line):
            check(words, parse, load)


def python_blocks(page):
    return [ast.parse(block) for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_on_a_page_imports_what_there_is(page):
    for block in python_blocks(page):
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                assert all(importlib.import_module(alias.name) for alias in node.names)


OBJECTS = {"pipeline": Pipeline, "pipe": DCIPipeline}
"""What the pages call an object of each of our classes."""


def our_calls(tree):
    """Yield a call's function and how many arguments before the written ones it takes, for each call of our classes."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, _, method = ast.unparse(call.func).partition(".")
        if name in OBJECTS and not method:
            yield call, OBJECTS[name].__call__, 1
        elif name in OBJECTS and "." not in method and hasattr(OBJECTS[name], method):
            yield call, getattr(OBJECTS[name], method), 1
        elif name in ("Pipeline", "DCIPipeline"):
            yield call, getattr({"Pipeline": Pipeline, "DCIPipeline": DCIPipeline}[name], method), 0


def accepted(function):
    """What a function takes as keywords besides those of its signature; None: whatever another library takes."""
    from diffusers import StableDiffusionPipeline

    theirs = inspect.signature(StableDiffusionPipeline.__call__).parameters.keys()
    return {Pipeline.__call__: OPTIONS, DCIPipeline.__call__: DUAL_BRANCH | theirs}.get(function)


def check_call(call, function, before, whole):
    """Fail for a call that its function would refuse: a keyword that there is not, or too many arguments.

    Args:
        whole: it is code to be run; otherwise it may leave required arguments out.
    """
    signature, keywords = inspect.signature(function), {keyword.arg: None for keyword in call.keywords}
    (signature.bind if whole else signature.bind_partial)(*[None] * (before + len(call.args)), **keywords)
    if (known := accepted(function)) is not None:
        assert keywords.keys() <= known | signature.parameters.keys(), ast.unparse(call)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_on_a_page_calls_with_what_there_is(page):
    for block in python_blocks(page):
        for call, function, before in our_calls(block):
            check_call(call, function, before, whole=True)
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for code in re.findall(r"(?<!`)`((?:[Pp]ipeline|pipe|DCIPipeline)\b[\w.]*\([^`]*\))`(?!`)", text):
        for call, function, before in our_calls(ast.parse(code)):
            check_call(call, function, before, whole=False)


@pytest.mark.parametrize(
    "code",
    ["Pipeline.load(FILE, modle=BASE)", "pipeline(TEXT, agg_tme=0.3)", "pipe(TEXT, agg_tme=0.3)", "pipe.parse(a, b, c)"],
)
def test_a_call_with_a_mistake_is_not_understood(code):
    [(call, function, before)] = our_calls(ast.parse(code))
    with pytest.raises((TypeError, AssertionError)):
        check_call(call, function, before, whole=False)
