"""Environment variables as machines, job scripts and people set them: results, or one line."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
from command_lines import COMMANDS, left_by, models
from figures import record

# Runs commands one after the other and prints their exit codes.
DRIVER = """
import json, sys
from mdiff.cli import main
codes = {}
for name, words in json.loads(sys.argv[1]).items():
    try:
        main(words)
    except SystemExit as end:
        codes[name] = end.code
with open("codes.json", "w") as file:
    json.dump(codes, file)
"""
NAMES = ("generate", "generate input", "train", "eval", "tokenizer encode", "doctor")
# None removes a variable. Values that are not given a code are no error.
SETTINGS: list[tuple[dict[str, str | None], dict[str, int]]] = [
    ({"OMP_NUM_THREADS": "abc", "MKL_NUM_THREADS": "x"}, {}),
    ({"OMP_NUM_THREADS": "0"}, {}),
    ({"OMP_NUM_THREADS": "", "OMP_WAIT_POLICY": "sometimes", "GOMP_SPINCOUNT": "x"}, {}),
    ({"COLUMNS": "x", "LINES": "-3"}, {}),
    ({"COLUMNS": "0", "LINES": "0", "TERM": "dumb"}, {}),
    ({"COLUMNS": "1", "TERM": "nonsense"}, {}),
    ({"TERM": None, "NO_COLOR": "1", "COLUMNS": "99999999999999999999"}, {}),
    ({"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"}, {}),
    ({"TTY_COMPATIBLE": "maybe", "TTY_INTERACTIVE": "x"}, {}),
    ({"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}),
    ({"LC_ALL": "xx_YY.UTF-99", "LANGUAGE": "zz"}, {}),
    ({"PYTHONIOENCODING": "ascii"}, {}),
    ({"PYTHONIOENCODING": "latin-1"}, {}),
    ({"PYTHONIOENCODING": "cp1252:replace"}, {}),
    ({"PYTHONIOENCODING": "shift_jis:surrogateescape"}, {}),
    ({"PYTHONIOENCODING": "utf-16"}, {}),
    ({"PYTHONUNBUFFERED": "1", "PYTHONOPTIMIZE": "2"}, {}),
    ({"HOME": None, "USER": None, "LOGNAME": None}, {}),
    ({"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}, {}),
    ({"HOME": "", "PATH": ""}, {}),
    ({"TMPDIR": "/proc/none"}, {}),
    ({"HF_HOME": "/proc/none", "HF_DATASETS_CACHE": "/proc/none", "HF_HUB_CACHE": "/proc"}, {}),
    ({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "yes", "TOKENIZERS_PARALLELISM": "so"}, {}),
    ({"TORCH_HOME": "/proc/none", "TRITON_CACHE_DIR": "/proc/none", "TRITON_INTERPRET": "x"}, {}),
    ({"MDIFF_BACKEND": "reference"}, {}),
    ({"MDIFF_BACKEND": ""}, {}),
    ({"MDIFF_BACKEND": "nonsense"}, dict.fromkeys(("generate", "generate input", "eval"), 5)
     | {"doctor": 7}),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {}),
    ({"RANK": "0", "WORLD_SIZE": "2"}, {"train": 5}),
    ({"WORLD_SIZE": "two"}, {"train": 2, "generate input": 2}),
    ({"LOCAL_RANK": "0"}, {}),
    ({"ACCELERATE_MIXED_PRECISION": "nonsense", "ACCELERATE_USE_CPU": "perhaps"}, {}),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"}, {}),
    ({"CUDA_VISIBLE_DEVICES": "x", "CUDA_LAUNCH_BLOCKING": "1"}, {}),
    ({"PYTHONWARNINGS": "always", "PYTHONDEVMODE": "0"}, {}),
]  # fmt: skip


@pytest.mark.faults
def test_no_variable_of_the_environment_ends_in_an_unexpected_error(tmp_path: Path) -> None:
    models(tmp_path)
    words = json.dumps({name: COMMANDS[name].words for name in NAMES})

    def tried(number: int) -> list[str]:
        given, wanted = SETTINGS[number]
        here = tmp_path / str(number)
        here.mkdir()
        for name in ("text", "story.txt", "tiny.yaml", "requests.jsonl"):
            (here / name).symlink_to(tmp_path / name)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | {
            name: value for name, value in given.items() if value is not None
        }  # fmt: skip
        for name, value in given.items():
            if value is None:
                environment.pop(name, None)
        done = processes.python(
            "-c", DRIVER, words, cwd=here, env=environment, timeout=500, errors="replace"
        )
        err = done.stderr
        if not (here / "codes.json").exists():
            return [f"{given}: exit code {done.returncode}: {err[-500:]}"]
        codes = json.loads((here / "codes.json").read_text())
        wrong = [
            f"{given}: {name} ends with {codes.get(name)}, not {wanted.get(name, 0)}: {err[-500:]}"
            for name in NAMES
            if codes.get(name) != wanted.get(name, 0)
        ]
        if "Traceback" in err:
            wrong.append(f"{given}: {err[-500:]}")
        if not wrong:
            for name in NAMES:
                if codes[name] == 0:
                    left_by(COMMANDS[name], here)
        return wrong

    with ThreadPoolExecutor(2) as pool:
        wrong = [line for lines in pool.map(tried, range(len(SETTINGS))) for line in lines]
    record("environment", {"processes": len(SETTINGS), "wrong": len(wrong)})
    assert not wrong, "\n".join(wrong)
