"""Processes that tests start: none of them, nor of their descendants, outlives its test or pytest.

A child has a mark in its environment, which its descendants inherit whatever their session and
parent. `running` kills by this mark on every way out of it; a watchdog does so for a pytest that is
itself killed, by the mark that all processes of that pytest have. Marks are read from /proc.

`forked` processes start at once: a server that has imported the package forks them, in no thread's
midst. Their stderr is a pipe, as that of `running` ones.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

MARK = "MDIFF_TEST_PROCESSES"
NUMBERS = itertools.count()
# Rounds of a hundredth of a second: a process in an uninterruptible call cannot be waited for.
ROUNDS = 1000
# What the server imports, which looks for modules where its interpreter does: not beside the tests.
PRELOADED = [
    "mdiff.pipeline.batch.offline", "mdiff.backbones.transformer", "mdiff.modalities.text.modality",
    "mdiff.pipeline.batch.encoding", "mdiff.modalities.image.codecs.kmeans", "mdiff.training.loop",
    "mdiff.backbones.masked_lm", "pytest",
]  # fmt: skip


def marked(mark: str) -> list[int]:
    """The other processes that have a mark; a zombie has none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return [process for process in found if process != os.getpid()]


def end(mark: str) -> None:
    """Kill all processes that have a mark, those too that they start meanwhile."""
    for _ in range(ROUNDS):
        left = marked(mark)
        if not left:
            return
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def new_mark() -> str:
    """A mark of its own, after those that this process's descendants have already."""
    return f"{os.environ.get(MARK, '')}{os.getpid()}-{next(NUMBERS)}-{os.urandom(4).hex()};"


def watched() -> None:
    """Mark all processes that this one starts, and have them killed when it has ended."""
    os.environ[MARK] = new_mark()
    # A shell has its jobs in the background ignore Ctrl-C, and so would what they start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Of its own session: what ends this process's group must not end the watchdog.
    subprocess.Popen(
        [sys.executable, "-S", __file__, os.environ[MARK], str(os.getpid())],
        env={}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@contextmanager
def running(
    words: Sequence[object], *, env: dict[str, str] | None = None, **options: object
) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, which is killed at the end with all its descendants.

    Standard output and error are pipes of text, and OpenMP has one thread, unless `env` or other
    options of Popen are given.
    """
    mark = new_mark()
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if env is None else env
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    process = subprocess.Popen(
        [str(word) for word in words], env=environment | {MARK: mark}, start_new_session=True,
        **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        end(mark)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def run(
    words: Sequence[object], *, input: str | None = None, timeout: float = 400,
    check: bool = False, **options: object,
) -> subprocess.CompletedProcess:  # fmt: skip
    """The ended process, as `subprocess.run` gives it; `check` asserts that its code is 0."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with running(words, **options) as process:
        said, errors = process.communicate(input, timeout=timeout)
    assert not check or process.returncode == 0, errors
    return subprocess.CompletedProcess(words, process.returncode, said, errors)


def python(*words: object, **options: object) -> subprocess.CompletedProcess:
    """The ended process of this interpreter; see `run`."""
    return run([sys.executable, *words], **options)


def launcher(config: object, *options: object) -> list[object]:
    """The words before a script of as many processes as a file of accelerate says."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", config,
        "--main_process_port", "0", *options,
    ]  # fmt: skip


def server() -> multiprocessing.context.ForkServerContext:
    """The context of processes that the server forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass
class Forked:
    """A process of the server, with the methods of Popen that tests of `running` ones use."""

    process: BaseProcess
    stderr: TextIO

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 400) -> tuple[None, str]:
        """Nothing and what is left of its standard error, when it has ended."""
        errors = self.stderr.read()
        self.process.join(timeout)
        return None, errors


@contextmanager
def forked(
    task: Callable[..., object], *arguments: object, env: dict[str, str] | None = None
) -> Iterator[Forked]:
    """A process of the server that calls a function, in its own session; ended as by `running`.

    `env` is added to the environment. An exception is a traceback and the exit code 1.
    """
    mark, context = new_mark(), server()
    read, write = context.Pipe(duplex=False)
    given = {"OMP_NUM_THREADS": "1"} | (env or {}) | {MARK: mark}
    process = context.Process(target=_call, args=(write, given, task, arguments))
    process.start()
    write.close()
    with open(read.fileno(), closefd=False, encoding="utf-8", errors="replace") as stderr:
        try:
            yield Forked(process, stderr)
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            end(mark)
            process.join()
            read.close()


def _call(
    write: Connection, environment: dict[str, str], task: Callable[..., object],
    arguments: Sequence[object],
) -> None:  # fmt: skip
    """What a process of the server does."""
    import torch

    os.setsid()
    os.dup2(write.fileno(), 2)
    write.close()
    os.environ.update(environment)
    torch.set_num_threads(1)
    task(*arguments)


def together(config: object, task: Callable[..., object], *arguments: object) -> None:
    """Call a function in as many forked processes as a file of accelerate says.

    They have the environment that `accelerate launch` and torchrun give to theirs.
    """
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(config), "--main_process_port", "0", "script.py"]
    asked, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    given = prepare_multi_gpu_env(asked) | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(asked.main_process_port),
        "WORLD_SIZE": str(asked.num_processes),
    }  # fmt: skip

    def ended(process: Forked) -> None:
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    # The processes end before the threads that read what they say.
    with ThreadPoolExecutor(asked.num_processes) as pool, ExitStack() as stack:
        ranks = (
            given | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(asked.num_processes)
        )
        started = [stack.enter_context(forked(task, *arguments, env=rank)) for rank in ranks]
        for future in as_completed([pool.submit(ended, process) for process in started]):
            future.result()


if __name__ == "__main__":
    while os.getppid() == int(sys.argv[2]):
        time.sleep(0.2)
    end(sys.argv[1])
