"""What nodes in processes of their own do; those that listen say their port first, and then what happens."""

import signal
import time
from collections.abc import Callable, Sequence

from dllama import Llama, SamplerSettings
from dllama.cluster import worker as worker_module
from dllama.cluster.key import ClusterKey
from dllama.cluster.links import Link
from dllama.cluster.listener import Listener
from dllama.cluster.settings import ClusterSettings
from dllama.cluster.slice_cache import SliceCache
from dllama.cluster.worker import IDLE_SECONDS, Worker, WorkerSettings
from dllama.engine import speed


def say(line: str) -> None:
    print(line, flush=True)


def worker(
    cache: str,
    cache_limit: int | None = None,
    port: int = 0,
    nthreads: int = 1,
    idle_seconds: float = IDLE_SECONDS,
    speeds: Sequence[float] = (),
    **options,
) -> None:
    """A worker, with these of the `WorkerSettings`. At SIGUSR1 it does nothing any more but keep its connections.
    ``speeds``: what it measures, one after the other."""
    worker_module.IDLE_SECONDS = idle_seconds
    if speeds:
        left = iter(speeds)
        worker_module.read_speed = lambda _: next(left, speeds[-1])
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))
    measure_little()
    slices = SliceCache(cache, cache_limit, notify=say)
    node = Worker(WorkerSettings("127.0.0.1", port, nthreads=nthreads, cache=slices, **{"key": None, **options}), say)
    say(str(node.port))
    node.serve()


def endless_root(*addresses: str) -> None:
    """A root over these workers that writes one text after the other, and says its pieces."""
    settings = ClusterSettings(addresses, None, (1,) * (1 + len(addresses)))
    with Llama(nthreads=1, buffer_float_type="f32", cluster=settings) as llama:
        while True:
            for piece in llama.generate("Tom has", 100, SamplerSettings(temperature=0)):
                say(piece.text)


def echo(key: ClusterKey | None) -> None:
    """Sends back whatever comes."""
    with Listener("127.0.0.1", 0, key) as listener:
        say(str(listener.port))
        while True:
            peer, frames = listener.receive()
            peer.send(frames)


def hello(address: str, times: int = 1) -> None:
    """Says hello to a listener, and then nothing more."""
    with Link(address, None) as link:
        for _ in range(times):
            link.send([b"hello"])
        link.receive()


def measure_little(set_value: Callable = setattr) -> None:
    """Each start of a node measures for up to a second how fast it reads memory; here less, as ratios are given."""
    for name, value in (("NBYTES", 1 << 20), ("SECONDS", 0.001), ("LONG_SECONDS", 0.001)):
        set_value(speed, name, value)
