"""Forks after use, in a process of its own: `python tests/forks.py fastbn,torch 50`.

Imports the libraries in this order, starts their threads, then forks about so many children in each of several ways.
Every child computes with threads too, and compares the bits. Prints how many children there were; ends with an error
at once if one hangs or computes something else. tests/test_processes.py starts it.
"""

import importlib
import multiprocessing
import sys
import threading

LIBRARIES = {name: importlib.import_module(name) for name in sys.argv[1].split(",")}

import numpy as np  # noqa: E402 (whose threads come after those of the libraries)

fastbn, torch = LIBRARIES["fastbn"], LIBRARIES.get("torch")
HANGS = 120  # seconds; a child takes some milliseconds
CONTEXT = multiprocessing.get_context("fork")
RNG = np.random.default_rng(0)
X, DY = (RNG.standard_normal((16, 24, 31, 17), dtype=np.float32) for _ in range(2))


def work():
    """All that uses threads: the bytes of the results."""
    y, cache = fastbn.batchnorm_forward(X, np.ones(24), np.zeros(24), activation="relu", num_threads=2)
    dx = fastbn.batchnorm_backward(DY, cache, num_threads=2).dx
    if torch is not None:
        torch.set_num_threads(2)
        assert (torch.from_numpy(y) + torch.from_numpy(dx)).numpy().tobytes() == (y + dx).tobytes()
    return y.tobytes(), dx.tobytes()


EXPECTED = work()


def check(_=None):
    assert work() == EXPECTED, "other bits"
    return True


def child(generations=1):
    check()
    if generations > 1:
        fork(generations - 1)


def fork(generations=1):
    process = CONTEXT.Process(target=child, args=(generations,))
    process.start()
    process.join(HANGS * generations)
    if process.exitcode is None:
        process.kill()
        sys.exit("a forked child hangs")
    if process.exitcode:
        sys.exit(f"a forked child ends with {process.exitcode}")


def plain(count):
    for _ in range(count):
        fork()
    return count


def nested(count):
    """Children of children of children."""
    for _ in range(0, count, 3):
        fork(3)
    return -(-count // 3) * 3


def from_a_thread(count):
    """Two threads call, a third one forks."""
    done = threading.Event()
    forked = []

    def call():
        while not done.is_set():
            check()

    def fork_all():
        for _ in range(count):
            fork()
            forked.append(1)

    callers = [threading.Thread(target=call) for _ in range(2)]
    forker = threading.Thread(target=fork_all)
    for thread in (*callers, forker):
        thread.start()
    forker.join()
    done.set()
    for thread in callers:
        thread.join()
    if len(forked) < count:
        sys.exit("a child forked by a thread did not end well")
    return count


def pool(count):
    """multiprocessing.Pool, which forks from a thread of its own: a child for each task."""
    with CONTEXT.Pool(2, maxtasksperchild=1) as workers:
        try:
            assert all(workers.map_async(check, range(count), chunksize=1).get(HANGS + count))
        except multiprocessing.TimeoutError:
            sys.exit("a child of a Pool hangs")
    return count


def data_loader(count):
    """Workers of PyTorch's DataLoader: two for each pass."""

    class Checks(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return check()

    for _ in range(0, count, 2):  # a worker that hangs is a RuntimeError after the timeout
        loader = torch.utils.data.DataLoader(Checks(), num_workers=2, multiprocessing_context="fork", timeout=HANGS)
        assert len(list(loader)) == 4
    return -(-count // 2) * 2


def main(total):
    ways = [plain, nested, from_a_thread, pool, *([data_loader] if torch is not None else [])]
    print(sum(way(-(-total // len(ways))) for way in ways))
    check()


if __name__ == "__main__":
    main(int(sys.argv[2]))
