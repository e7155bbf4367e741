"""``atserving key``: keys to sign releases with."""

from __future__ import annotations

import getpass
from pathlib import Path

import click

from atserving import signatures


@click.group(help="Make keys to sign releases with.")
def key() -> None:
    pass


@key.command(
    help="Write a new private key to FILE, which only you can read, and print its public key for --trusted-keys. A key "
    "of `ssh-keygen -t ed25519` without a passphrase serves, too."
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--comment", default=getpass.getuser, show_default="your name", allow_from_autoenv=False)
def generate(file: Path, comment: str) -> None:
    click.echo(signatures.generate(file, " ".join(comment.split())))
