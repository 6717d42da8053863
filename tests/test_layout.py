"""The rooms: who may import whom, what the wheel holds, what an import costs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import mdiff
from mdiff.find import find, names

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mdiff"

# From the ground up; a module imports what lies below its own floor. Within a floor modules
# may build on each other but for the rooms, whose parts never import another room.
FLOORS = [
    {"kernels"},
    {"errors"},
    {"data", "denoiser", "places", "schedule", "tokens"},
    {"block_cache", "bound", "conditioning", "filling", "hidden_loss", "hiding", "layers",
     "objective", "ops", "other_start"},
    {"adaln_layers", "backbones", "bit_order", "canvas", "canvas_parts", "captions", "codec",
     "codec_beside", "codec_networks", "codec_training", "codecs", "decoder_layers",
     "diffusers_layers", "editing", "emoji", "expert_layers", "files", "find", "modalities",
     "order", "packing", "picture_files", "picture_rows", "pictures", "published",
     "published_codec", "published_grid", "request_lines", "safe_yaml", "samplers", "shards",
     "sources", "text_encoder", "tokenizer", "uvit_layers", "vqgan_networks", "weights"},
    {"amused", "checkpoint", "config", "conversion", "families", "inspection", "journal",
     "jobs", "loading", "locate", "optim", "placing", "saving", "training_state",
     "transformers_model", "volume", "workers", "zero", "zero_slices"},
    {"bench", "bench_draw", "bench_generation", "bench_loss", "bench_sides", "bench_timing",
     "evaluate", "generation", "guidance", "judge", "loader_server", "machine", "metrics",
     "offline", "offline_plan", "offline_shards", "peers", "picture_figures", "pipeline",
     "ranking", "representation", "run", "sampling", "scoring", "selftest", "shard_writing",
     "stepping", "trace", "train"},
    {"__main__", "cli"},
]  # fmt: skip
ROOMS = {"modalities", "codecs", "backbones", "samplers"}
CORE = ["tokens", "schedule", "objective", "hiding", "hidden_loss", "bound", "denoiser", "ops",
        "filling", "data", "train", "stepping", "run", "order", "conditioning", "optim",
        "checkpoint", "training_state", "saving", "zero", "zero_slices"]  # fmt: skip
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


def imports(path):
    """The modules of the package that a file imports at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "mdiff":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("mdiff."):
                yield node.module.removeprefix("mdiff.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mdiff."):
                    yield alias.name.removeprefix("mdiff.")


def floor(name):
    top = name.partition(".")[0]
    found = [level for level, rooms in enumerate(FLOORS) if top in rooms]
    assert len(found) == 1, f"{name} has no floor: give it one in FLOORS"
    return found[0]


def test_imports_point_downwards_only():
    wrong = []
    for name, path in modules():
        for imported in imports(path):
            if imported.startswith("__"):
                continue
            here, there = name.partition(".")[0], imported.partition(".")[0]
            upwards = floor(imported) > floor(name)
            across = here in ROOMS and there in ROOMS and here != there
            if upwards or across:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_a_sampler_does_not_import_another_but_blocks_its_default():
    wrong = [
        (name, imported)
        for name, path in modules()
        if name.startswith("samplers.")
        for imported in imports(path)
        if imported.startswith("samplers.")
        and (name, imported) != ("samplers.blocks", "samplers.first_hitting")
    ]
    assert not wrong


def test_kernels_import_nothing_of_the_package_but_kernels():
    for name, path in modules():
        if name.startswith("kernels"):
            assert all(i.startswith("kernels") for i in imports(path)), name


def test_the_core_knows_no_modality():
    for name, path in modules():
        if name in CORE or name.startswith(("kernels.", "samplers.")):
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
        "mdiff/trace.html",
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
    assert found.pop("conversion") == ["pickle", "torch.load"]
    assert {name: what for name, what in found.items() if what} == {}
    source = (PACKAGE / "conversion.py").read_text()
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
