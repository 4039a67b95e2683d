"""`dllama key`: the cluster's key, made, shown and replaced."""

import json
from pathlib import Path

import click

from dllama.cluster import key as cluster_key
from dllama.cluster.key import ClusterKey, key_path

key_file = click.option(
    "--key-file",
    metavar="FILE",
    help="Key file. [default: $DLLAMA_KEY_FILE, else cluster.key in your configuration folder]",
)


@click.group(invoke_without_command=True)
@click.pass_context
def key(ctx: click.Context) -> None:
    """Show, make or replace the key of the cluster.

    Only nodes with the same key talk to each other, and all they say is encrypted. It is a small file, the same on each
    device; the first "dllama worker" makes one. Copy it to the other devices as it is, readable by you alone.

    \b
      dllama key show
      dllama key make --key-file lab.key
      ssh shelf dllama key show
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@key.command()
@key_file
@click.option("--secret", is_flag=True, help="Print the key itself: whoever sees it can use the workers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(key_file, secret, as_json) -> None:
    """Show where the key is, and its fingerprint.

    The fingerprint tells one key from another and is no secret: two devices with the same fingerprint have the same
    key.

    \b
      dllama key show
      dllama key show --key-file lab.key --json
      dllama key show --secret > copy.key
    """
    path = key_path(key_file)
    found = cluster_key.load(path)
    if as_json:
        halves = {"public": found.public.decode(), "secret": found.secret.decode()} if secret else {}
        click.echo(json.dumps({"file": str(path), "fingerprint": found.fingerprint, **halves}, indent=2))
    elif secret:
        click.echo(found.text, nl=False)
    else:
        click.echo(f"{path}: cluster key {found.fingerprint}")


@key.command()
@key_file
def make(key_file) -> None:
    """Make a new key where there is none yet.

    \b
      dllama key make
      dllama key make --key-file lab.key
    """
    path = key_path(key_file)
    _report(path, cluster_key.create(path), "new cluster key")


@key.command()
@key_file
def rotate(key_file) -> None:
    """Put a new key in place of the old one, which is gone then.

    Do this when somebody has seen the key or a device is lost. All other devices need the new key afterwards; workers
    that are running go by the old one until they are started again.

    \b
      dllama key rotate
    """
    path = key_path(key_file)
    _report(path, cluster_key.rotate(path), "new cluster key in place of the old one")


def _report(path: Path, made: ClusterKey, what: str) -> None:
    click.echo(f"{path}: {what}, {made.fingerprint}")
    click.echo(f"to copy it to another device, type there: {cluster_key.copy_command(path)}")
