"""The rooms: who may import whom, what the wheel holds, what an import costs."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from folders import ROOT

import mdiff
from mdiff.find import find, names

PACKAGE = ROOT / "mdiff"

# From the ground up. A file imports rooms of lower floors and its own room, never another on its
# own floor.
FLOORS = [
    {"errors", "kernels"},
    {"tokens", "schedule", "ops", "find", "files"},
    {"denoiser"},
    {"objective", "sampling", "backbones", "modalities"},
    {"samplers"},
    {"pipeline"},
    {"training", "evaluation"},
    {"cli"},
]
# Entries of a folder beside its __init__.py; rooms whose files are parts or commands hold more.
MOST_AT_THE_TOP, MOST_IN_A_FOLDER = 23, 13
OF_PARTS = {
    "kernels", "samplers", "backbones", "backbones/published", "modalities/image/codecs", "cli",
}  # fmt: skip
CORE = ("tokens", "schedule", "ops", "denoiser", "objective", "sampling", "training")
# A recipe is read at the surface.
NOT_CORE = {"training.recipe"}
MODALITY_WORDS = re.compile(r"\b(images?|texts?|pixels?|prompts?|pictures?|captions?)\b", re.I)


def modules():
    """(dotted name below mdiff, path) of every module, the two top-level rooms included."""
    for path in sorted(
        PACKAGE.rglob("*.py", recurse_symlinks=True)
        if sys.version_info >= (3, 13)
        else walk(PACKAGE)
    ):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        if name:
            yield name, path


def walk(folder):
    for base, _, files in os.walk(folder, followlinks=True):
        yield from (Path(base) / file for file in files if file.endswith(".py"))


def dotted(path):
    """The name of a file or a folder below the package, such as "files.atomic"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path, known):
    """The files and folders of the package that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module != "mdiff" and not node.module.startswith("mdiff."):
                continue
            origin = node.module.removeprefix("mdiff").removeprefix(".")
            for alias in node.names:
                whole = f"{origin}.{alias.name}" if origin else alias.name
                yield whole if whole in known else origin
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mdiff."):
                    yield alias.name.removeprefix("mdiff.")


@functools.cache
def arrows():
    """(importing file, imported file or folder) of every import inside the package."""
    paths = {dotted(path): path for _, path in modules()}
    return sorted(
        {
            (name, imported)
            for name, path in paths.items()
            for imported in imports(path, paths)
            if imported and not imported.startswith("__")
        }
    )


def floor(name):
    """The floor of a file's room; a file at the top that has none lies above all of them."""
    room = name.partition(".")[0]
    return next((level for level, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def wrong_arrows(pairs):
    """The arrows that do not point to a lower floor or into their own room."""
    return [
        f"{name} imports {imported}"
        for name, imported in pairs
        if name.partition(".")[0] != imported.partition(".")[0] and floor(imported) >= floor(name)
    ]


def circles(pairs):
    """The groups of files that reach each other by imports."""
    to = {}
    for name, imported in pairs:
        to.setdefault(name, set()).add(imported)
    reached = {}
    for start in to:
        seen, left = set(), [start]
        while left:
            for other in to.get(left.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    left.append(other)
        reached[start] = seen
    return sorted({
        tuple(sorted(other for other in found if start in reached.get(other, ())))
        for start, found in reached.items() if start in found
    })  # fmt: skip


def full_folders(root):
    """The folders that hold more entries than a room may."""
    found = {}
    for base, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name not in ("__pycache__", "builtin")]
        place = str(Path(base).relative_to(root))
        entries = [f for f in files if f.endswith(".py") and f != "__init__.py"] + folders
        most = MOST_AT_THE_TOP if place == "." else MOST_IN_A_FOLDER
        if place not in OF_PARTS and len(entries) > most:
            found[place] = len(entries)
    return found


def test_every_room_has_a_floor():
    rooms = {entry.stem for entry in PACKAGE.iterdir() if entry.suffix in ("", ".py")}
    assert rooms - {"__init__", "__main__", "__pycache__", "builtin"} == set().union(*FLOORS)


@pytest.mark.xfail(reason="the rooms are being rebuilt")
def test_imports_point_downwards_only():
    assert wrong_arrows(arrows()) == []


@pytest.mark.xfail(reason="the rooms are being rebuilt")
def test_no_files_import_each_other_in_a_circle():
    assert circles(arrows()) == []


@pytest.mark.xfail(reason="the rooms are being rebuilt")
def test_no_folder_is_too_full():
    assert full_folders(PACKAGE) == {}


def test_the_rules_see_what_breaks_them(tmp_path):
    assert wrong_arrows([("tokens", "files"), ("denoiser.a", "sampling"), ("cli.a", "cli.b")]) == [
        "tokens imports files", "denoiser.a imports sampling",
    ]  # fmt: skip
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")]) == [("a", "b", "c")]
    (tmp_path / "sub").mkdir()
    for number in range(MOST_IN_A_FOLDER + 1):
        (tmp_path / "sub" / f"f{number}.py").touch()
    assert full_folders(tmp_path) == {"sub": MOST_IN_A_FOLDER + 1}


def test_a_sampler_does_not_import_another_but_blocks_its_default():
    wrong = [
        pair
        for pair in arrows()
        if pair[0].startswith("samplers.")
        and pair[1].startswith("samplers.")
        and pair != ("samplers.blocks", "samplers.first_hitting")
    ]
    assert not wrong


def test_kernels_import_nothing_of_the_package_but_kernels():
    assert all(b.startswith("kernels") for a, b in arrows() if a.startswith("kernels"))


def test_the_core_knows_no_modality():
    for name, path in modules():
        if name.startswith((*CORE, "kernels.", "samplers.")) and name not in NOT_CORE:
            found = MODALITY_WORDS.search(path.read_text())
            assert found is None, f"{path}: {found}"


def test_the_two_rooms_are_links_to_directories_without_init():
    for room in ("kernels", "samplers"):
        link = PACKAGE / room
        assert link.is_symlink()
        assert os.readlink(link) == f"../{room}"
        assert (ROOT / room).is_dir()
        assert not (ROOT / room / "__init__.py").exists()


@pytest.mark.parametrize("room", ["samplers", "backbones", "modalities", "codecs"])
def test_every_part_is_found_by_the_name_of_its_file(room):
    assert names(room)
    for name in names(room):
        assert callable(find(room, name))
        assert find(room, name.replace("_", "-")) is find(room, name)


def test_importing_the_package_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys, mdiff; heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'triton'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5


def test_public_names_resolve_and_unknown_ones_do_not():
    for name in mdiff.__all__:
        assert getattr(mdiff, name) is not None
    with pytest.raises(AttributeError):
        mdiff.nothing  # noqa: B018


def test_the_wheel_has_one_top_level_name_and_both_rooms(tmp_path):
    # What an earlier build left there would be packed too, though its source is gone.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("mdiff_toolkit-*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"mdiff"}
    for expected in (
        "mdiff/kernels/philox.py",
        "mdiff/kernels/onepass.c",
        "mdiff/samplers/first_hitting.py",
        "mdiff/py.typed",
        "mdiff/cli/views/trace.html",
    ):
        assert expected in files
    built = [name for name in files if name.startswith("mdiff/kernels/_onepass")]
    assert len(built) == (shutil.which("cc") is not None), built
    packed = {name for name in files if name.endswith(".py")}
    here = {f"mdiff/{path.relative_to(PACKAGE)}" for _, path in modules()} | {"mdiff/__init__.py"}
    assert packed == here


def forbidden(tree):
    """(line, what) of each call, import and statement that the package does without."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            yield from ((node.lineno, m) for m in modules if m.split(".")[0] in UNPICKLERS)
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            plain = isinstance(node.value, ast.Constant) and node.value.value is False
            yield from () if plain else ((node.value.lineno, node.arg),)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            loader = next((ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"), "")
            safe = called == "yaml.load" and "Safe" in loader
            if called in CALLS and not safe:
                yield node.lineno, called


UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "torch.load", "yaml.load",
         "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}  # fmt: skip


def test_no_unsafe_loading_in_the_package():
    found = {
        name: sorted(what for _, what in forbidden(ast.parse(path.read_text())))
        for name, path in modules()
    }
    # The one file that opens pickles, with the restricted reader; it needs pickle's error type.
    assert found.pop("pipeline.conversion") == ["pickle", "torch.load"]
    assert {name: what for name, what in found.items() if what} == {}
    source = (PACKAGE / "pipeline" / "conversion.py").read_text()
    assert source.count("torch.load(") == source.count("weights_only=True") == 1
    assert set(re.findall(r"\bpickle\.\w+", source)) == {"pickle.UnpicklingError"}


@pytest.mark.parametrize(
    "line",
    ["assert x", "import pickle", "from pickle import loads", "eval('1')", "yaml.load(x)",
     "yaml.load(x, Loader=yaml.Loader)", "f(trust_remote_code=True)", "f(trust_remote_code=x)",
     "torch.load(x)", "np.load(x, allow_pickle=True)"],
)  # fmt: skip
def test_each_forbidden_line_is_seen(line):
    assert list(forbidden(ast.parse(line)))
