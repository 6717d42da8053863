"""The pages: links, code, names and command lines are those of the repository as it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from types import FunctionType

import gallery
import numpy as np
import pages
import processes
import pytest
import typer
from folders import ROOT
from PIL import Image

import mdiff
from mdiff.cli import UsageError, app, run
from mdiff.find import names
from mdiff.training.recipe import Recipe

each_page = pytest.mark.parametrize("page", pages.NAMES)
# What a browser would fetch to show a page; links that a reader may follow are no such thing.
FETCHED = re.compile(
    r"""<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:|//)|url\(["']?https?:"""
)
# Words of synopses that stand for a number.
NUMBERS = {"N", "K", "S", "P", "H"}
# Flags of other programs that pages name.
OTHER_FLAGS = {"--main_process_ip", "--set"}
SOURCES = ("mdiff", "kernels", "samplers", "benchmarks", "examples", "configs", "tests", "docs")
# What a command will write, and names of other projects that our code does not hold.
WRITTEN = ("benchmarks/results/gpu.json",)
THEIRS = ("torch.distributed.fsdp", "fsdp_cpu_ram", "XmodPreTrainedModel", "default_language")


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in pages.anchors(file), target


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in pages.DOCS.rglob("*.md"):
        assert f"{page.relative_to(pages.DOCS)}\n" in config, page.name


@cache
def top():
    """The command line as it is parsed."""
    return typer.main.get_command(app())


def leaf(words):
    """The command of words and the words after its name."""
    command, rest = top(), list(words)
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, words
        command, rest = command.commands[rest.pop(0)], rest
    return command, rest


def parsed(command, rest):
    """Parse the words after a command's name; UsageError where they are none of its."""
    with command.make_context("mdiff", ["3" if each in NUMBERS else each for each in rest]):
        pass


@pytest.mark.parametrize(
    "config", sorted(map(str, (ROOT / "configs").rglob("*.yaml"))), ids=lambda path: Path(path).name
)
def test_every_command_line_in_a_comment_of_a_recipe_is_one(config):
    lines = re.findall(r"^ *# +mdiff (.+(?:(?<=\\)\n *#.*)*)", Path(config).read_text(), re.M)
    for line in lines:
        command, rest = leaf(shlex.split(re.sub(r"\\\n *#", " ", line)))
        parsed(command, rest)


@each_page
def test_every_command_line_of_mdiff_is_one(page):
    for words in pages.mdiff_lines(page):
        command, rest = leaf(words)
        # In a sentence a name alone is the command and not a call, and options may be left out.
        if not rest:
            continue
        try:
            parsed(command, rest)
        except UsageError as error:
            in_a_sentence = " ".join(["mdiff", *words]) in pages.inline(page)
            if not in_a_sentence or not error.format_message().startswith("Missing"):
                raise


@each_page
def test_every_other_command_names_what_there_is(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for words in pages.command_lines(page):
        line = " ".join(words)
        if words[0] == "make" and len(words) > 1:
            assert {word for word in words[1:] if "=" not in word} <= set(targets), line
        for file in (word for word in words if word.endswith(".py")):
            assert (ROOT / file).is_file(), line
            code = (ROOT / file).read_text()
            for flag in re.findall(r" (--[a-z-]+)", line.partition(file)[2]):
                assert f'"{flag}"' in code, line
        for config in re.findall(r"configs/\S+", line):
            assert (ROOT / config).is_file(), line
        for extras in re.findall(r"(?:\.|toolkit)\[([\w,-]+)\]", line):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), line


@each_page
def test_every_flag_is_one_of_a_command(page):
    flags = OTHER_FLAGS | {"--help", "--debug"}
    groups = [top()]
    while groups:
        command = groups.pop()
        groups += getattr(command, "commands", {}).values()
        flags |= {flag for parameter in command.params for flag in parameter.opts}
    for code in pages.inline(page):
        if code.startswith("--"):
            assert code.split()[0].partition("=")[0] in flags, code


@each_page
def test_every_block_of_python_is_python_and_imports_what_there_is(page):
    for block in pages.blocks(page):
        if block.language != "python":
            continue
        tree = ast.parse(block.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mdiff"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert resolves(f"{node.module}.{alias.name}"), ast.unparse(node)
                assert module
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("mdiff."):
                assert resolves(ast.unparse(node)), ast.unparse(node)
        found = processes.python(
            "-m", "ruff", "check", "--isolated", "--select", "F821", "-", input=block.text
        )
        assert found.returncode == 0, found.stdout


def resolves(dotted):
    """Whether a dotted name is a module or an attribute of one, of a class too."""
    module, rest = dotted, []
    while module:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            rest.insert(0, name)
            continue
        except ImportError:
            # The C library, which is loaded and not imported.
            return True
        for name in rest:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@each_page
def test_every_dotted_name_of_mdiff_is_one(page):
    for code in pages.inline(page):
        dotted = re.match(r"mdiff(?:\.\w+)+", code)
        if dotted:
            assert resolves(dotted[0]), code


@each_page
def test_every_key_of_a_recipe_is_one(page):
    for code in pages.inline(page):
        section, dot, key = code.partition("=")[0].partition(".")
        if not dot or section not in ("objective", "optim", "train", "log"):
            continue
        if re.fullmatch(r"[a-z_]+", key) and key not in ("json", "jsonl", "safetensors"):
            assert key in Recipe.model_fields[section].annotation.model_fields, code


@cache
def every_file():
    """The paths of the repository's files and folders, each with a slash before it."""
    found = [path for top in SOURCES for path in (ROOT / top).rglob("*")]
    return [f"/{path.relative_to(ROOT)}" for path in (*found, *ROOT.iterdir())]


@cache
def every_word():
    """Every word of the repository's code and data, and the stems of its files and folders."""
    words = {part.partition(".")[0] for path in every_file() for part in path.split("/")}
    for path in (ROOT / file[1:] for file in every_file()):
        if path.suffix in (".py", ".c", ".yaml", ".toml") and path.name != "test_docs.py":
            words |= set(re.findall(r"\w+", path.read_text("utf-8")))
    return words


def is_model_type(name):
    """Whether transformers has models of this model_type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return name in CONFIG_MAPPING_NAMES


@each_page
def test_every_name_and_path_in_a_line_is_somewhere_in_the_code(page):
    """Names with an underscore or two capitals, and paths; other words may be values."""
    for code in pages.inline(page):
        path, _, inside = code.partition("::")
        if re.fullmatch(r"[\w/.-]+\.(?:py|c|yaml|md)", path):
            (file, *_) = [each for each in every_file() if each.endswith(f"/{path}")] or [None]
            assert file, code
            assert not inside or f"def {inside}(" in (ROOT / file[1:]).read_text(), code
        elif re.fullmatch(r"\w+(?:/[\w.-]+)+/?", path) and path.split("/")[0] in SOURCES:
            assert code in WRITTEN or (ROOT / path).exists(), code
        elif re.fullmatch(r"(?:\w+\.)*(?:\w*_\w*|[A-Z]\w*[a-z][A-Z]\w*)(?:\(.*\)|=.*)?", code):
            name = re.match(r"[\w.]+", code)[0]
            known = name.startswith(THEIRS) or set(name.split(".")) <= every_word()
            assert known or is_model_type(name), code


DIRECTIVES = re.findall(
    r"^::: (\S+)$", "".join(map(pages.text_of, (n for n in pages.NAMES if "api/" in n))), re.M
)


def test_the_reference_has_every_public_name():
    documented = set(DIRECTIVES) | {name.replace("mdiff.errors.", "mdiff.") for name in DIRECTIVES}
    missing = {f"mdiff.{name}" for name in mdiff.__all__ if name != "__version__"} - documented
    missing |= {f"mdiff.samplers.{name}.{name}" for name in names("samplers")} - documented
    assert not missing
    assert len(DIRECTIVES) == len(set(DIRECTIVES))


@pytest.mark.parametrize("name", DIRECTIVES)
def test_what_the_reference_names_is_there_and_has_a_docstring(name):
    assert resolves(name)
    module, _, last = name.rpartition(".")
    found = getattr(importlib.import_module(module), last)
    assert inspect.getdoc(found) or not isinstance(found, type | FunctionType)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in pages.NAMES if name != gallery.PAGE])
def test_the_commands_of_a_page_that_need_nothing_else_run(page, tmp_path, monkeypatch, capsys):
    """Those of models of the package, in the order of the page; the gallery has its own test."""
    monkeypatch.chdir(tmp_path)
    # The files of the reader's that pages name: the requests that the page shows, and a picture.
    lines = [line.strip() for block in pages.blocks(page) for line in block.text.splitlines()]
    Path("requests.jsonl").write_text("".join(f"{line}\n" for line in lines if line[:2] == '{"'))
    Image.new("RGB", (32, 32), "gold").save("face.png")
    for words in pages.mdiff_lines(page):
        named = [word for word in words if re.fullmatch(r"[A-Z.]{3,}\w*", word)]
        if len(words) > 2 and words[1].startswith("builtin:") and not named:
            if "--num-samples" in words:
                # Two show that the command runs.
                words[words.index("--num-samples") + 1] = "2"
            assert run(words) == 0, (words, capsys.readouterr().err)


def test_the_pictures_of_the_gallery_are_small_and_named_by_a_command_above_them():
    files = gallery.shown()
    assert sum(file.stat().st_size for file in files) <= 300_000
    for file in files:
        before = pages.text_of(gallery.PAGE).partition(f"pictures/{file.name}")[0]
        assert f" {file.name}\n" in before, file


@pytest.mark.slow
def test_the_commands_of_the_gallery_make_its_pictures(tmp_path):
    """Up to what a rounding on another processor changes: some tiles, not the whole."""
    gallery.draw(tmp_path)
    for file in gallery.shown():
        made = tmp_path / file.name
        if file.suffix == ".html":
            assert made.read_text("utf-8").count("\n") == file.read_text("utf-8").count("\n")
            continue
        with Image.open(made) as new, Image.open(file) as old:
            assert (new.size, getattr(new, "n_frames", 1)) == (
                old.size,
                getattr(old, "n_frames", 1),
            )
            pixels = [np.asarray(each.convert("L"), dtype=float) for each in (new, old)]
        # Pictures of another seed or other options are 15 levels and more apart.
        assert np.abs(pixels[0] - pixels[1]).mean() < 8, file


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    processes.python(
        "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, cwd=ROOT, check=True
    )
    made = [path for path in tmp_path.rglob("*") if path.suffix in (".html", ".css")]
    assert len(made) > len(pages.NAMES)
    for page in made:
        assert not FETCHED.search(page.read_text("utf-8")), page


def test_the_readme_names_every_family_and_those_without_official_outputs():
    """As the table of docs/checkpoints.md has them, each by the first name of its row."""
    text = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    table = text[text.index("| family |") : text.index("Rope scaling (")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named, _, excepted = readme[readme.index("## Models of other projects") :].partition("except ")
    rows = re.findall(r"^\| ([\w-]+(?: v\d)?).*$", table, re.MULTILINE)
    without = re.findall(r"^\| ([\w-]+).*no official outputs.*$", table, re.MULTILINE)
    assert len(rows) > 20
    assert [name for name in rows[1:] if name not in named + excepted.split("). ")[0]] == []
    assert len(without) >= 5
    assert [name for name in without if name not in excepted.split(").")[0]] == []
