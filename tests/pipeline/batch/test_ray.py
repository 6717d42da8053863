"""Ray: the bytes of one process, whatever happens to the cluster. Where the extra is installed."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import processes
import pytest
from folders import ROOT, SUPPORT
from toy_job import TIMEOUT, journal, run, there
from volume_runs import asked, begin, content, encode, tiny_model, tiny_pictures, written

from mdiff.errors import BackendError, ConfigError, DataError
from mdiff.modalities.image.codec import save_codec
from mdiff.modalities.image.codecs.kmeans import kmeans

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="the extra ray is not installed")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of two nodes on this machine, of one core each; tests may end the second."""
    from ray.cluster_utils import Cluster

    # Its processes import the toys as well.
    paths = os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": paths}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield made
    made.shutdown()


@pytest.fixture
def second(cluster):
    """The second node, for one test."""
    node = cluster.add_node(num_cpus=1)
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_two_nodes_give_the_files_of_one_process_also_where_items_crash(cluster, second, out):
    shards = [("a", "b+kill+c"), ("leave once", "d"), ("hang", "slow"), ("e",)]
    said = []
    options = {"engine": "ray", "address": cluster.address, "timeout": 5 * TIMEOUT}
    assert run(out, *shards, report=said.append, **options) == 4
    assert there(out) == {
        "0.txt": "a b (WorkerCrashedError of Ray) c", "1.txt": "leave once d",
        "2.txt": f"({5 * TIMEOUT:g} s of silence) slow", "3.txt": "e",
    }  # fmt: skip
    assert journal(out).count("0 kill") == 3


def test_an_error_of_an_item_is_its_own(cluster, second, out):
    with pytest.raises(DataError, match="no such word"):
        run(out, ("a",), ("refuse",), engine="ray", address=cluster.address)


def kill_when(cluster, node, begun):
    """End a node as soon as `begun` holds."""

    def wait_and_kill():
        while not begun():
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def test_generation_of_which_a_node_is_killed_gives_the_bytes_of_one_process(
    cluster, second, tmp_path, out
):
    model = tiny_model(tmp_path / "tiny")
    requests = written(tmp_path / "in.jsonl", asked())
    begin(model, requests, tmp_path / "clean")
    killing = kill_when(cluster, second, lambda: len(list(out.glob("shards/shard-*"))) > 4)
    begin(model, requests, out, engine="ray", address=cluster.address)
    killing.join()
    assert content(out) == content(tmp_path / "clean")


def test_encoding_of_which_a_node_is_killed_gives_the_bytes_of_one_process(
    cluster, second, tmp_path, out
):
    save_codec(kmeans(codebook_size=8).fit(tiny_pictures(80).pixels), tmp_path / "codec")
    encode(tmp_path / "codec", 80, tmp_path / "clean", workers=1)
    killing = kill_when(cluster, second, lambda: len(list(out.glob("shard-*"))) > 4)
    encode(tmp_path / "codec", 80, out, engine="ray", address=cluster.address)
    killing.join()
    assert content(out) == content(tmp_path / "clean")


def test_a_cluster_is_started_where_no_address_is_given_and_ended_after(out, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *filter(None, sys.path)]))
    assert run(out, ("a", "b"), ("kill once",), engine="ray", workers=2) == 2
    assert there(out) == {"0.txt": "a b", "1.txt": "kill once"}
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "127.0.0.1:99999"])
def test_a_cluster_that_does_not_answer_is_named_soon(out, address):
    start = time.monotonic()
    with pytest.raises(BackendError, match=f"no Ray cluster answers at {address}"):
        run(out, ("a",), engine="ray", address=address)
    assert time.monotonic() - start < 30


def test_a_server_that_is_no_cluster_is_named_soon(tmp_path):
    """In a process of its own: how often Ray tries is read when it is imported."""
    model, requests = tiny_model(tmp_path / "tiny"), written(tmp_path / "in.jsonl", asked()[:3])
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        words = ["generate", model, "--input", str(requests), "--out", str(tmp_path / "out")]
        words += ["--engine", "ray", "--address", address]
        done = processes.python("-m", "mdiff", *words, cwd=ROOT, timeout=120)
    assert done.returncode == 5
    assert f"error: no Ray cluster answers at {address}" in done.stderr


@pytest.mark.parametrize("address", ["nonsense", "ray://x", "a:b", "a:1:2", ":1", "", "http://a:1"])
def test_an_address_that_is_none_is_refused(out, address):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        run(out, ("a",), engine="ray", address=address)
