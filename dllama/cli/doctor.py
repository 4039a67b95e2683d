"""`dllama doctor`: what is wrong with this machine or with its cluster, and what to do about it."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby

import click

from dllama import __version__
from dllama.cli import options
from dllama.cli.node_options import SeveralValues
from dllama.cluster.settings import DEFAULT_PORT
from dllama.doctor.finding import Finding, State
from dllama.errors import ClusterKeyError, KernelError
from dllama.formats import ModelFile

HERE = "this machine"
MARKS = {State.OK: "✅", State.UNKNOWN: "❔", State.SLOW: "🐢", State.WRONG: "❌"}


@click.command(cls=SeveralValues)
@click.option(
    "--workers", multiple=True, metavar="[USER@]HOST[:PORT] ...", help="Look at these workers too; USER is for --ssh."
)
@click.option("--ssh", is_flag=True, help="Run it on the workers themselves as well; ssh must work without a password.")
@click.option("--model", metavar="FILE", help="Model that has to fit. [default: the small embedded model]")
@click.option(
    "--max-seq-len", type=click.IntRange(min=1), metavar="N", help="Context in tokens. [default: the model's own]"
)
@click.option(
    "--key-file",
    metavar="FILE",
    help="The cluster's key. [default: $DLLAMA_KEY_FILE, else cluster.key in your configuration folder]",
)
@click.option("--insecure", is_flag=True, help="Do without a key, as the workers do.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(workers, ssh, model, max_seq_len, key_file, insecure, as_json) -> None:
    """Find out what is wrong, and what to do about it.

    Looks at this machine: its system, the kernels that its CPU selects, speed, memory, heat, power, clock and disk; and
    with --workers, as the root would, at the workers: can they be reached, with the same key and version, over what
    link, and does the model fit into all nodes together? The exit status is 1 if something does not work.

    \b
      dllama doctor
      dllama doctor --model model.m --workers 10.0.0.2 10.0.0.3
      dllama doctor --workers pi@10.0.0.2 pi@10.0.0.3 --ssh
    """
    if (ssh or insecure) and not workers:
        raise click.UsageError(f"{'--ssh' if ssh else '--insecure'} is about workers: it needs --workers")
    # each worker's address, and the user to log in as there
    addresses = dict(_address(name) for value in workers for name in value.split(",") if name.strip())
    with options.open_model_file(model) as file:
        found = list(_examine(file, max_seq_len or file.config.seq_len, addresses, ssh, key_file, insecure))
    if as_json:
        listed = [asdict(finding) | {"state": finding.state.value} for finding in found]
        values = {"version": __version__, "time": time.time(), "findings": listed}
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        click.echo(_text(found))
    if any(finding.state is State.WRONG for finding in found):
        click.get_current_context().exit(1)


def _address(name: str) -> tuple[str, str]:
    """HOST:PORT and USER of [USER@]HOST[:PORT]."""
    user, _, host = name.strip().rpartition("@")
    return host if ":" in host and not host.endswith("]") else f"{host}:{DEFAULT_PORT}", user


def _examine(
    model: ModelFile, context: int, addresses: dict[str, str], ssh: bool, key_file: str | None, insecure: bool
) -> Iterator[Finding]:
    from dllama.doctor import device
    from dllama.doctor.board import board_findings
    from dllama.folders import cache_folder

    yield device.system(HERE)
    yield device.versions(HERE)
    try:
        yield from device.kernels(HERE, model, bool(addresses))
        own, finding = device.speed(HERE)
    except KernelError as error:
        yield Finding(HERE, "kernels", State.WRONG, str(error), "unset DLLAMA_KERNELS, and the best are chosen")
        return
    yield finding
    yield from board_findings(HERE, cache_folder())
    if not addresses:
        yield device.memory_alone(HERE, model, context)
        return
    yield from _cluster(model, context, own, addresses, ssh, key_file, insecure)


def _cluster(model, context, own, addresses, ssh, key_file, insecure) -> Iterator[Finding]:
    from dllama.cluster import key as cluster_key
    from dllama.doctor.remote import remote_findings
    from dllama.doctor.workers import memory, plan_findings, worker_findings

    yield memory(HERE, own)
    path = cluster_key.key_path(key_file)
    try:
        key = None if insecure else cluster_key.load(path)
    except ClusterKeyError as error:
        yield Finding(HERE, "key", State.WRONG, str(error), "the workers have been left alone: they need the same key")
        return
    if key is not None:
        yield Finding(HERE, "key", State.OK, f"{path}: cluster key {key.fingerprint}", value=key.fingerprint)
    nodes = [own]
    for address, user in addresses.items():
        spec, findings = worker_findings(address, key)
        nodes += [spec] if spec else []
        yield from findings
        if ssh:
            yield from remote_findings(address, user)
    yield from plan_findings(model, context, nodes)


def _text(found: list[Finding]) -> str:
    """The findings node by node, in the order in which the nodes came up first."""
    nodes = list(dict.fromkeys(finding.node for finding in found))
    lines = []
    for node, findings in groupby(sorted(found, key=lambda one: nodes.index(one.node)), lambda one: one.node):
        lines.append(node)
        for finding in findings:
            lines.append(f"  {MARKS[finding.state]} {finding.check:<11} {finding.text}")
            if finding.advice:
                lines.append(f"     {'':<11} 👉 {finding.advice}")
    counts = {state: sum(finding.state is state for finding in found) for state in (State.WRONG, State.SLOW)}
    lines.append(f"{counts[State.WRONG]} wrong, {counts[State.SLOW]} could be better, of {len(found)} looked at")
    return "\n".join(lines)
