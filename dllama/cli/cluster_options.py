"""The options that make a command the root of a cluster."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from dllama.cli.node_options import Ratios
from dllama.cluster.settings import DEFAULT_PORT, STEP_TIMEOUT, ClusterSettings
from dllama.errors import ClusterError, ClusterKeyError, PlanError

CLUSTER_OPTIONS = (
    click.option(
        "--workers",
        multiple=True,
        metavar="HOST[:PORT] ...",
        help="Share the model out over this machine and the workers that run on these.",
    ),
    click.option(
        "--local-workers",
        type=click.IntRange(1, 64),
        metavar="N",
        help="Start N workers on this machine for this run: a cluster to try out.",
    ),
    click.option(
        "--ratios",
        type=Ratios(),
        metavar="A:B:...",
        help="Shares, this machine's first, such as 2:1:1. [default: what is fastest; equal for local workers]",
    ),
    click.option(
        "--key-file",
        metavar="FILE",
        help="The cluster's key. [default: $DLLAMA_KEY_FILE, else cluster.key in your configuration folder]",
    ),
    click.option("--insecure", is_flag=True, help="Do without a key; the workers have to be started the same way."),
    click.option(
        "--step-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=STEP_TIMEOUT,
        show_default=True,
        metavar="SECONDS",
        help="A worker that does not answer for so long counts as lost.",
    ),
)


@contextmanager
def cluster(
    workers: tuple[str, ...],
    local_workers: int | None,
    ratios: tuple[float, ...] | None,
    key_file: str | None,
    insecure: bool,
    step_timeout: float,
    nthreads: int | None,
    notify: Callable[[str], None],
    cloud_model: str | None = None,
) -> Iterator[tuple[ClusterSettings | None, int | None]]:
    """The cluster that the options ask for, None where they do not, and the threads of this machine.

    Local workers run as long as the block. ``cloud_model``: the model's file, where the one worker is to be a cloud for
    edges. Raises click.UsageError, ClusterError, ClusterKeyError, PlanError.
    """
    if workers and local_workers:
        raise click.UsageError("either --workers or --local-workers, not both")
    if cloud_model:
        _check_cloud(workers, local_workers, ratios)
    names = worker_names(workers)
    _check(len(names) or local_workers, ratios, key_file, insecure)
    if insecure:
        notify("--insecure: nothing is encrypted, and anybody on the network could be the workers")
    if local_workers:
        from dllama.cluster import local
        from dllama.kernels.team import usable_cpus

        threads = max(1, usable_cpus() // (local_workers + 1))
        settings = {"secure": not insecure, "step_timeout": step_timeout, "notify": notify}
        if cloud_model:
            start = local.local_cloud(cloud_model, threads, **settings)
        else:
            start = local.local_workers(local_workers, threads, ratios=ratios, **settings)
        with start as started:
            yield started, nthreads or threads
    elif names:
        addresses = worker_addresses(names)
        key = None if insecure else _key(key_file, addresses[0])
        yield ClusterSettings(addresses, key, ratios, step_timeout=step_timeout), nthreads
    else:
        yield None, nthreads


def _check(workers: int | None, ratios: tuple[float, ...] | None, key_file: str | None, insecure: bool) -> None:
    for name, given in (("--ratios", ratios), ("--key-file", key_file), ("--insecure", insecure)):
        if given and not workers:
            raise click.UsageError(f"{name} is for a cluster: it needs --workers or --local-workers")
    check_ratios(workers, ratios)


def check_ratios(workers: int, ratios: tuple[float, ...] | None) -> None:
    """Raises PlanError where they are not as many as the nodes."""
    if ratios and len(ratios) != workers + 1:
        raise PlanError(
            f"{len(ratios)} ratios for this machine and {workers} {'worker' if workers == 1 else 'workers'}: "
            "each needs one, this machine's first"
        )


def _check_cloud(workers: tuple[str, ...], local_workers: int | None, ratios: tuple[float, ...] | None) -> None:
    count = len([name for value in workers for name in value.split(",") if name.strip()]) + (local_workers or 0)
    if count != 1:
        raise click.UsageError("--mode privatelora needs one worker, the cloud: --workers HOST[:PORT]")
    if ratios:
        raise click.UsageError("--ratios is for a cluster, and --mode privatelora has --edge-layers")


def worker_names(values: tuple[str, ...]) -> list[str]:
    """The workers that --workers names. Raises click.UsageError where it is given and names none."""
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    if values and not names:
        raise click.UsageError("--workers names none")
    return names


def worker_addresses(names: list[str]) -> tuple[str, ...]:
    """The workers, all with a port. Raises ClusterError for what is no address, and for the same one twice."""
    from dllama.cluster import address

    found = {}
    for name in names:
        if ":" not in name or name.endswith("]"):
            name = f"{name}:{DEFAULT_PORT}"
        resolved = address.resolve(*address.parse(name))
        if resolved in found:
            both = "" if found[resolved] == name else f", as {found[resolved]} and as {name}"
            raise ClusterError(f"worker {resolved} is given twice{both}")
        found[resolved] = name
    return tuple(found.values())


def _key(key_file: str | None, worker: str):
    """The cluster's key. Raises ClusterKeyError, with what to type where there is none."""
    from dllama.cluster import address, key

    path = key.key_path(key_file)
    if key_file or os.environ.get(key.ENVIRONMENT) or os.path.lexists(path):
        return key.load(path)
    folder, host = shlex.quote(str(path.parent)), address.parse(worker)[0]
    source = shlex.quote(f"[{host}]:" if ":" in host else f"{host}:") + f".config/dllama/{key.FILE_NAME}"
    raise ClusterKeyError(
        f"no cluster key in {path}: copy it from a worker: mkdir -p -m 700 {folder} && scp -p {source} {folder}/"
    )
