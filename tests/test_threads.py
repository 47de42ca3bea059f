"""The pool of threads behind CPU products: made at first use, as many as torch is told, safe to fork, safe to share.

Each test runs in a process of its own, since threads, once made, stay.
"""

import subprocess
import sys
import textwrap

import pytest

from sparse_pathways.ops.library import MISSING

if MISSING is not None:
    pytest.skip(f"no compiled CPU kernels: {MISSING}", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("threads are counted through /proc", allow_module_level=True)

PRELUDE = """
import os, threading, time
from pathlib import Path
import torch
import sparse_pathways as sp

def pool():  # {thread id: nanoseconds it has run} of the pool's threads
    tasks = [task for task in Path("/proc/self/task").iterdir()
             if (task / "comm").read_text().strip() == "sparse_pathways"]
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks}

rng = torch.Generator().manual_seed(1)
mask = torch.rand(128, 1024, generator=rng) < 0.3
weight = torch.randn(1024, 1024, generator=rng) * mask.repeat_interleave(8, 0)
packed = sp.PackedWeight.pack(weight, mask)
x = torch.randn(64, 1024, generator=rng)

def product(rows=64):  # the same result whatever the threads: an output is summed by one of them
    return sp.sparse_linear(x[:rows], packed)

def spread():
    for _ in range(100):
        product()

def has_pool_of(helpers):  # on a busy machine a caller works alone for a while
    deadline = time.monotonic() + 20
    while len(pool()) < helpers and time.monotonic() < deadline:
        spread()
    return len(pool()) == helpers

def is_right(y):  # by numpy: torch's own threads do not survive a fork
    return (y.numpy() == right.numpy()).all()

torch.set_num_threads(1)
right = product()
assert torch.allclose(right.double(), x.double() @ weight.double().T, atol=1e-3)
"""


def run(body: str, abort: str | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 or (abort and abort in done.stderr), done.stderr


def test_no_thread_before_the_first_product_that_needs_one():
    run("""
        assert not pool() and sp.env()["pool_threads"] == 0
        torch.set_num_threads(2)
        product(1)  # too small to share
        assert not pool()
        product()
        assert has_pool_of(1) and sp.env()["pool_threads"] == 1
    """)


def test_set_num_threads_is_honoured():
    run("""
        for threads, helpers in ((1, 0), (2, 1), (3, 2), (2, 2)):
            torch.set_num_threads(threads)
            spread()
            assert has_pool_of(helpers), (threads, pool())
            assert is_right(product())
    """)


def test_fewer_threads_leave_the_others_asleep():
    run("""
        import time
        torch.set_num_threads(3)
        spread()
        torch.set_num_threads(1)
        time.sleep(0.2)  # the helpers look out for work a little longer
        before = pool()
        spread()
        assert pool() == before
    """)


def test_several_callers_at_once():
    run("""
        torch.set_num_threads(2)
        wrong = []
        def caller():
            torch.set_num_threads(2)
            for _ in range(100):
                if not is_right(product()):
                    wrong.append(1)
        callers = [threading.Thread(target=caller) for _ in range(4)]
        for one in callers: one.start()
        for one in callers: one.join()
        assert not wrong
        assert has_pool_of(1)
    """)


def test_a_fork_after_use_works():
    run("""
        torch.set_num_threads(3)
        spread()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                import signal
                signal.alarm(30)
                good = not pool() and is_right(product()) and is_right(product())
                os._exit(0 if good and has_pool_of(2) else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert is_right(product())
    """)


def test_a_fork_while_another_thread_multiplies():
    run("""
        torch.set_num_threads(2)
        stop = threading.Event()
        def caller():
            torch.set_num_threads(2)
            while not stop.is_set():
                product()
        other = threading.Thread(target=caller)
        other.start()
        codes = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                import signal
                signal.alarm(30)
                os._exit(0 if is_right(product()) else 1)
            codes.append(os.waitpid(child, 0)[1])
        stop.set()
        other.join()
        assert codes == [0] * 20, codes
    """)


def test_the_process_ends_while_threads_work():
    # Python ends a daemon thread where it asks for the interpreter again; torch's operators, and so ours, abort on that
    # (F.linear in its place does). What must not happen is that the process hangs.
    run(
        """
        torch.set_num_threads(3)
        def caller():
            while True:
                product()
        spread()
        threading.Thread(target=caller, daemon=True).start()
    """,
        abort="terminate called without an active exception",
    )


def test_signals_go_to_the_program():
    run("""
        torch.set_num_threads(2)
        spread()
        for thread in pool():
            lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
            blocked = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk"))
            for number in (2, 14, 15):  # INT, ALRM, TERM
                assert blocked >> (number - 1) & 1
    """)
