"""README and docs: every relative link leads somewhere, every command is one that the programs understand."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys

import pytest
from helpers import ROOT

from dci.cli.arguments import Parser
from dci.cli.main import PROGRAMS
from dci.finetuning.config_files import finetune_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "data").glob("*/README.md"))
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


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def commands(page):
    """The commands of a page: lines of its blocks, and what it has as code within its text if that has arguments."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    blocks = [content for language, content in blocks if language in ("", "bash", "sh")]
    blocks += re.findall(r"^ {4}((?:dci|python|bash|sbatch|pip) .*)$", text, re.M)
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    ours = r"(?:\w+=\S+ )*(?:dci|python|bash|sbatch|pip) .*"
    lines = [" ".join(code.split()) for code in inline if re.fullmatch(ours, code, re.S)]
    for block in blocks:
        lines += re.sub(r"\\\n", " ", block).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words_of(line):
    """The words of each command of a line; comments, variables, functions and redirections do not count."""
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


def check(words, parse):
    """Fail for a command that would be refused: a program, option, file, test or extra that there is not."""
    head, *args = words
    for word in args:
        if re.match(r"(?:configs|data|scripts|tests|benchmarks)/[\w./-]+$", word):
            assert (ROOT / word).exists(), word
    if head == "dci":
        if args[0] not in ("--help", "--version", "PROGRAM", "VERB"):
            assert args[0] in PROGRAMS, args[0]
            understood(args[0], args[1:], parse)
    elif head == "python" and args[0] == "-m":
        assert args[1] in ("pytest", "mypy", "dci")
    elif head == "python":
        if "Parser(" in (ROOT / args[0]).read_text() + ("Parser(" if "scripts/" in args[0] else ""):
            understood(args[0], args[1:], parse)
    elif head == "bash":
        assert (ROOT / args[0]).is_file()
    elif head == "sbatch":
        [place] = [i for i, word in enumerate(args) if word.endswith(".sbatch")]
        many = args[place].endswith("train_many.sbatch")  # takes a list of concepts, and hands on the rest
        script = "train_ico" if many else args[place].partition("slurm/")[2].removesuffix(".sbatch")
        args = args[place + 1 :] if not many else [*args[place + 2 :], "concept.class_noun=dog", "data.images=FOLDER"]
        understood(f"scripts/{script}.py", args, parse)
    elif head == "pip":
        wanted = [extra for found in re.findall(r"\[([\w,]+)\]", " ".join(args)) for extra in found.split(",")]
        section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        assert all(re.search(rf"^{extra} = \[", section, re.M) for extra in wanted), args
    else:
        assert head in FOREIGN, head


def understood(program, args, parse):
    """Parse a program's arguments, and build the configuration of a training."""
    if args:  # a program alone is only named
        parse(program, args)
    if program in ("train", "scripts/train_ico.py") and "--config" in args:
        overrides = [word for word in args if re.match(r"[a-z_]+(\.\w+)*=", word)]
        finetune_config(ROOT / args[args.index("--config") + 1], overrides)


CASES = [pytest.param(line, id=f"{named(page)}: {line[:60]}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", CASES)
def test_every_command_is_understood(line, parse):
    for words in words_of(line):
        check(words, parse)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_on_a_page_imports_what_there_is(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                assert all(importlib.import_module(alias.name) for alias in node.names)
