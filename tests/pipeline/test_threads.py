"""Models that several threads share: the same results as from one thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from denoisers import KINDS, calls, kind_of
from masked_lms import MASK, tiny

import mdiff

THREADS = 4


def differences(name, seeds):
    """The calls, with their seeds, that give something else from THREADS threads than from one."""
    asked = [
        (call, seed, made)
        for seed in range(seeds)
        for call, made in calls(kind_of(name), seed).items()
    ]
    alone = [made() for _, _, made in asked]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda one: one[2](), asked))
    return [one[:2] for one, a, b in zip(asked, alone, together) if a != b]


@pytest.mark.parametrize("name", KINDS)
def test_threads_share_a_model_of_each_kind(name):
    assert differences(name, seeds=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_threads_share_a_model_of_each_kind_in_many_calls(name):
    assert differences(name, seeds=200) == []


def folders(tmp_path):
    """Folders of masked language models of several types, and a model that ships."""
    found = {}
    for kind, dtype in (("bert", torch.bfloat16), ("nystromformer", torch.float32)):
        found[tmp_path / kind] = dtype
        tiny(kind, mask_token_id=MASK).to(dtype).save_pretrained(tmp_path / kind)
    return {**found, "builtin:shakespeare": torch.bfloat16}


def loads(folders, count):
    """What was wrong with `count` loads of each folder, one thread a folder, beside generation."""
    wrong, kind = [], kind_of("masked lm bert")
    expected = calls(kind, 0)["generate"]()

    def load(folder, dtype):
        try:
            for _ in range(count):
                pipeline = mdiff.load(folder, device="cpu")
                kinds = {p.dtype for p in pipeline.denoiser.parameters()}
                wrong.extend([] if kinds == {dtype} else [(folder, kinds)])
        except Exception as error:
            wrong.append((folder, error))

    threads = [threading.Thread(target=load, args=each) for each in folders.items()]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = calls(kind, 0)["generate"]()
        wrong.extend([] if found == expected else [found])
    return wrong


def test_models_load_in_several_threads_beside_generation(tmp_path):
    before = torch.get_default_dtype()
    assert loads(folders(tmp_path), 3) == []
    assert torch.get_default_dtype() == before


@pytest.mark.slow
def test_a_thousand_loads_beside_generation_abort_nothing(tmp_path):
    assert loads(folders(tmp_path), 334) == []
