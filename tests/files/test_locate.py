"""From a model's name to its checked files."""

from __future__ import annotations

import json
import shutil

import pytest
from folders import GOLDEN as GOLDEN

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import builtin_models, locate
from mdiff.files.locate import snapshot


def test_builtin_models_are_found_by_name_and_others_refused_with_the_nearest():
    assert {"shakespeare", "fashion", "emoji"} <= set(builtin_models())
    files = locate("builtin:fashion")
    assert files.folder == builtin_models()["fashion"]
    assert files.pipeline["backbone"] == "transformer"
    assert files.manifest.files.keys() >= {"config.json", "pipeline.json"}
    with pytest.raises(ConfigError, match="did you mean 'fashion'"):
        locate("builtin:fashon")
    with pytest.raises(ConfigError, match="did you mean builtin:fashion"):
        locate("fashion")


def test_a_directory_of_several_models_has_the_headers_of_all_parts():
    files = locate(str(GOLDEN / "amused"))
    assert set(files.parts) == {"transformer", "vqvae", "text_encoder"}
    assert set(files.classes) == {*files.parts, "tokenizer", "scheduler"}
    assert len(files.headers) == 3
    assert files.headers == {p: h for part in files.parts.values() for p, h in part.headers.items()}


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1, "files": []}',
                                     '{"format": 1, "files": {"config.json": 3}}'])  # fmt: skip
def test_a_snapshot_with_an_invalid_manifest_is_refused(tmp_path, content):
    folder = tmp_path / "snapshots" / "abc"
    shutil.copytree(GOLDEN / "mdlm", folder)
    (folder / "pipeline.json").write_text(json.dumps({"format": 1}))
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        snapshot(folder)
