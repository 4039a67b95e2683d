"""A worker as a process of its own: `python -m tests.cluster.run_worker OPTIONS`, the options as JSON.

It says the port in its first line and what happens in those after it, and ends with its standard input, so that none
outlives the process that started it.
"""

import json
import os
import signal
import sys
import threading
import time

from dllama.cluster import key
from dllama.cluster.slice_cache import SliceCache
from dllama.cluster.worker import Worker, WorkerSettings


def say(line: str) -> None:
    print(line, flush=True)


def main(
    cache: str, port: int = 0, key_file: str | None = None, nthreads: int = 1, cache_limit: int | None = None, **options
) -> None:
    cluster_key = key.load(key_file) if key_file else None
    slices = SliceCache(cache, cache_limit, notify=say)
    worker = Worker(WorkerSettings("127.0.0.1", port, cluster_key, nthreads, cache=slices, **options), say)
    say(str(worker.port))
    worker.serve()


def end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    main(**json.loads(sys.argv[1]))
