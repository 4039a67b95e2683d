"""`dllama worker`: lends this device to a cluster."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import click
from click.core import ParameterSource

from dllama.cli import quantities
from dllama.cli.cluster_options import check_ratios, worker_addresses, worker_names
from dllama.cli.live import Live
from dllama.cli.node_options import Ratios, SeveralValues
from dllama.cli.notify import Service
from dllama.cli.options import buffer_float_type, kv_float_type
from dllama.cli.program import INTERRUPTED
from dllama.cli.progress import Progress
from dllama.cli.quantities import Quantity
from dllama.cluster.settings import DEFAULT_PORT

ANY_HOST = ("", "*", "0.0.0.0", "::")

MODES = (
    (("",), ("memory", "cache_limit"), "a worker of a cluster: a cloud (--device) has the whole model and no slices"),
    (("auto", "cpu", "cuda"), ("adapters", "max_edges"), "the cloud of PrivateLoRA: it needs --device"),
    (("auto", "cuda"), ("unpack",), "a cloud that computes with CUDA: it needs --device cuda or auto"),
    (
        ("auto", "cpu"),
        ("buffer_float_type", "kv_float_type"),
        "a cloud that computes on the CPU: it needs --device cpu or auto; in a cluster the root says it",
    ),
)
"""Options with the devices that they are for ("": no cloud), and what is said where they are given with another."""


@click.command(cls=SeveralValues)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 takes any that is free.",
)
@click.option(
    "--host", default="0.0.0.0", show_default=True, metavar="ADDRESS", help="Of this device; 0.0.0.0 is all of them."
)
@click.option("--nthreads", type=click.IntRange(1, 256), metavar="N", help="Threads. [default: one for each core]")
@click.option(
    "--memory",
    type=Quantity("memory size", quantities.BYTES, "2GiB"),
    metavar="SIZE",
    help="Memory to use at most, such as 2GiB. [default: what is free]",
)
@click.option("--model", metavar="FILE", help="A copy of the model; a root that runs it need not send any weights.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"], case_sensitive=False),
    help="Be the cloud of PrivateLoRA: run the layers of --model for edges, on this device.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FILE",
    help="With --device: the cloud's half of an adapter whose A and B come from no seed; may be repeated.",
)
@click.option(
    "--max-edges",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    metavar="N",
    help="With --device: edges to serve at a time.",
)
@click.option(
    "--workers",
    multiple=True,
    metavar="HOST[:PORT] ...",
    help="With --device cpu: share the layers out over this device and the workers that run on these.",
)
@click.option(
    "--ratios",
    type=Ratios(),
    metavar="A:B:...",
    help="With --workers: shares, this device's first, such as 2:1:1. [default: what is fastest]",
)
@click.option(
    "--unpack",
    type=click.Choice(["f16", "bf16", "f32"], case_sensitive=False),
    help="With --device cuda: hold the matrices as these floats; faster, and larger. [default: as the file has them]",
)
@buffer_float_type("With --device cpu: activations that enter a product; q80 is fast, f32 is exact.")
@kv_float_type("With --device cpu: keys and values of past tokens.")
@click.option(
    "--cache-limit",
    type=Quantity("disk size", quantities.BYTES, "20GB"),
    metavar="SIZE",
    help="Disk that the slices of models may take, such as 20GB. [default: half of what is free, up to 100 GB]",
)
@click.option(
    "--key-file",
    metavar="FILE",
    help="The cluster's key. [default: $DLLAMA_KEY_FILE, else cluster.key in your configuration folder]",
)
@click.option("--insecure", is_flag=True, help="Do without a key: anybody who reaches the port can use this device.")
@click.option("--parent-fd", type=int, hidden=True)
def worker(
    port, host, nthreads, memory, model, device, adapters, max_edges, workers, ratios, unpack, buffer_float_type,
    kv_float_type, cache_limit, key_file, insecure, parent_fd,
) -> None:  # fmt: skip
    """Lend this device to a cluster.

    A worker waits for a root, which is "dllama inference --workers ..." on another device; it takes its slice of the
    root's model, and keeps it on disk for the next time. It serves one root after another until Ctrl-C.

    The first start makes the key of the cluster and tells how to copy it. Only nodes with the same key get in, so every
    other device needs that copy before its own first start.

    \b
      dllama worker
      dllama worker --port 9999 --nthreads 3 --memory 2GiB
      dllama worker --model model.m --key-file lab.key
      dllama worker --model model.m --device auto
      dllama worker --model model.m --device cpu --workers 10.0.0.2 10.0.0.3:9999

    With --device it is no part of a cluster but the cloud of PrivateLoRA: it has the model, and works its layers for
    several edges at once, which are "dllama inference --mode privatelora --workers ..." on other devices. With
    --workers it is the root of a cluster at that: plain workers have slices of these layers, and work them with it.
    """
    if device and not model:
        raise click.UsageError("--device needs --model with it: edges send no weights")
    _check_mode(device)
    _check_workers(workers, ratios, device, adapters)
    _end_at_signals()
    if parent_fd is not None:
        _end_with_parent(parent_fd)
    service = Service()

    def log(line: str) -> None:
        _log(line)
        service.status(line)

    progress = Progress(Live(), log)
    key = None if insecure else _key(key_file, host, port, bool(device))

    from dllama.cli.pulse import Pulse
    from dllama.kernels.team import in_threads, usable_cpus

    threads = nthreads or usable_cpus()
    if device:
        from dllama.formats import FloatType
        from dllama.privatelora.backends.open import open_backend
        from dllama.privatelora.cloud import Cloud, CloudSettings

        settings = CloudSettings(host, port, key, threads, model, adapters, max_edges)
        types = FloatType.parse(buffer_float_type), FloatType.parse(kv_float_type)
        if workers:
            from dllama.cluster.settings import ClusterSettings
            from dllama.privatelora.backends.cluster import over_workers

            cluster = ClusterSettings(worker_addresses(worker_names(workers)), key, ratios)
            backend = over_workers(cluster, threads, *types, progress.say, progress)
        else:
            backend = open_backend(device.lower(), threads, *types, progress.say, unpack)
        served = Cloud(settings, backend, progress.say, progress)
        does = f"{served.device}, for edges"
    else:
        from dllama.cluster.slice_cache import SliceCache
        from dllama.cluster.worker import Worker, WorkerSettings

        settings = WorkerSettings(
            host,
            port,
            key,
            threads,
            memory=None if memory is None else int(memory),
            model=model,
            cache=SliceCache(limit=None if cache_limit is None else int(cache_limit), notify=progress.say),
            measured=parent_fd is None,  # a root that starts workers of its own has ratios
        )
        served = Worker(settings, progress.say, progress)
        does = in_threads(threads)
    where = _join(host if host not in ANY_HOST else _own_address(), served.port)
    how = "--insecure: anybody who reaches it can use this device" if insecure else f"cluster key {key.fingerprint}"
    log(f"listening on {_join(host, served.port)}, {does}, {how}")
    who, mode = ("an edge", "--mode privatelora ") if device else ("a root", "")
    _log(f"{who} reaches it with {mode}--workers {where}" + (" --insecure" if insecure else ""))
    if parent_fd is not None:
        os.write(parent_fd, b"%d\n" % served.port)
    if service.watchdog_seconds:
        served.hub.add(Pulse(service.alive, service.watchdog_seconds / 3))
    service.ready()
    served.serve()


def _check_mode(device: str | None) -> None:
    """Raises click.UsageError for an option that would have no effect."""
    context = click.get_current_context()
    for kinds, names, reason in MODES:
        for name in names:
            given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            if given and (device or "").lower() not in kinds:
                option = next(param.opts[0] for param in context.command.params if param.name == name)
                raise click.UsageError(f"{option} is for {reason}")


def _check_workers(workers: tuple[str, ...], ratios: tuple[float, ...] | None, device: str | None, adapters) -> None:
    names = worker_names(workers)
    if names and (device or "").lower() != "cpu":
        raise click.UsageError("--workers is for a cloud over several devices: it needs --device cpu")
    if names and adapters:
        raise click.UsageError("--adapter and --workers: a cloud over several devices makes A and B out of seeds only")
    if ratios and not names:
        raise click.UsageError("--ratios is for a cloud over several devices: it needs --workers")
    check_ratios(len(names), ratios)


def _key(key_file: str | None, host: str, port: int, cloud: bool):
    """The cluster's key. The one in the user's configuration folder is made where it is not there yet."""
    from dllama.cluster import key as cluster_key

    path = cluster_key.key_path(key_file)
    if key_file or os.environ.get(cluster_key.ENVIRONMENT):  # a name that was given has to be right
        return cluster_key.load(path)
    key, is_new = cluster_key.load_or_create(path)
    if is_new:
        own = host if host not in ANY_HOST else _own_address()
        copy = cluster_key.copy_command(path, f"[{own}]" if ":" in own else own)
        click.echo(_welcome(path, key.fingerprint, copy, _join(own, port), cloud), err=True)
    return key


def _welcome(path: Path, fingerprint: str, copy: str, address: str, cloud: bool) -> str:
    """What the first start says."""
    new = f"New cluster key {fingerprint} in {path}: whoever has it may use"
    if cloud:
        return f"""\
{new} this cloud.

On each device that is to be an edge, with a copy of the same model, type:
  {copy}
  dllama inference --mode privatelora --model model.m --tokenizer tokenizer.t --prompt "Hello" --workers {address}
"""
    return f"""\
{new} the workers.

On the device that is to be the root, the one with the model, type:
  {copy}
  dllama inference --model model.m --tokenizer tokenizer.t --prompt "Hello" --workers {address}

On each further worker, before its first start, as it would make a key of its own otherwise:
  {copy}
  dllama worker
"""


def _own_address() -> str:
    """The address that other devices reach this one by, as far as it can be told; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of no network (RFC 5737): it only asks for the way out
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _log(line: str) -> None:
    click.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", err=True)


def _end_at_signals() -> None:
    """Ctrl-C and SIGTERM end the process at once, whatever it is at: what came of a slice is on the disk already."""
    codes = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: 0}
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)  # gets the signal's number even while the main thread is in a kernel
    for number in codes:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a job in the background ignores Ctrl-C
            signal.signal(number, lambda *_: None)

    def wait() -> None:
        (number,) = os.read(told, 1)
        if sys.stderr.isatty():  # the cursor may be behind a bar
            os.write(sys.stderr.fileno(), b"\n")
        os._exit(codes[number])

    threading.Thread(target=wait, name="dllama-signals", daemon=True).start()


def _end_with_parent(fd: int) -> None:
    """Whoever started this worker holds the other end of a pipe: it does not outlive them."""

    def wait() -> None:
        os.read(fd, 1)
        os._exit(0)

    threading.Thread(target=wait, name="dllama-parent", daemon=True).start()
