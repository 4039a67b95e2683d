"""The cluster key: whoever has it may join the cluster, and nobody else.

It is one Curve25519 keypair for the whole cluster, in a small text file that is copied to every device. Workers show it
as servers and nodes that connect show it as clients; a worker admits only nodes that hold the same pair.
"""

import contextlib
import errno
import getpass
import os
import secrets
import shlex
import socket
import stat
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from dllama.errors import ClusterKeyError, FileError
from dllama.folders import config_folder
from dllama.formats.files import open_regular, reason

ENVIRONMENT = "DLLAMA_KEY_FILE"
FILE_NAME = "cluster.key"
MAX_BYTES = 4096

HEADING = (
    "# The key of a dllama cluster: whoever has it may use the workers. Copy it to each device, show it to nobody."
)


class ClusterKey(NamedTuple):
    """A keypair in Z85, 40 characters each."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"ClusterKey({self.fingerprint})"

    @property
    def text(self) -> str:
        """What a key file says."""
        return f"{HEADING}\npublic = {self.public.decode()}\nsecret = {self.secret.decode()}\n"

    @property
    def fingerprint(self) -> str:
        """Tells one key from another, and may be shown to anybody: 12 digits, from a hash of the public half."""
        digest = blake2b(self.public, digest_size=6, person=b"dllama key").hexdigest()
        return "-".join(digest[i : i + 4] for i in range(0, 12, 4))


def key_path(path: str | os.PathLike | None = None) -> Path:
    """Where the key is: ``path``, else ``$DLLAMA_KEY_FILE``, else cluster.key in the user's configuration folder."""
    return Path(path or os.environ.get(ENVIRONMENT) or config_folder() / FILE_NAME)


def copy_command(path: str | os.PathLike, host: str | None = None) -> str:
    """What to type on another device of the cluster so that it has the key of this one.

    host: how other devices call this one; None for its own name
    """
    source = f"{getpass.getuser()}@{host or socket.gethostname()}:{os.path.abspath(path)}"
    return f"mkdir -p -m 700 ~/.config/dllama && scp -p {shlex.quote(source)} ~/.config/dllama/{FILE_NAME}"


def generate() -> ClusterKey:
    """A new key, in no file."""
    import zmq  # not above: the command line's help need not wait for it

    return ClusterKey(*zmq.curve_keypair())


def load(path: str | os.PathLike) -> ClusterKey:
    """Read a key. Raises ClusterKeyError where the file is missing, damaged, somebody else's or open to others."""
    try:
        with open_regular(path) as file:
            _check_owner(path, os.fstat(file.fileno()))
            content = file.read(MAX_BYTES + 1)
    except FileError as error:
        hint = "" if os.path.lexists(path) else "; copy it from a device that has it, or 'dllama key make' makes one"
        raise ClusterKeyError(f"{error}{hint}") from None
    except OSError as error:
        raise ClusterKeyError(f"{path}: {reason(error)}") from None
    return parse(path, content)


def create(path: str | os.PathLike) -> ClusterKey:
    """Make a new key file, readable by its owner alone. Raises ClusterKeyError where there is one already."""
    try:
        return _create(path)
    except FileExistsError:
        raise ClusterKeyError(f"{path}: exists already; 'dllama key rotate' puts a new key in its place") from None


def load_or_create(path: str | os.PathLike) -> tuple[ClusterKey, bool]:
    """The key in this file, and whether it was made just now. Raises ClusterKeyError."""
    if not os.path.lexists(path):
        with contextlib.suppress(FileExistsError):  # another process was faster
            return _create(path), True
    return load(path), False


def rotate(path: str | os.PathLike) -> ClusterKey:
    """Put a new key in place of the one in this file; every device needs the new one, and the old one is gone.

    No copy of it is left: whoever rotates a key wants it to be worth nothing. Raises ClusterKeyError where there is no
    sound key to replace, as what else the file may hold is not ours to delete.
    """
    load(path)
    key, target = generate(), Path(os.path.realpath(path))  # a link is written through, not replaced
    with _complaints(path), _temporary(target, key) as temporary:
        os.replace(temporary, target)
    return key


def parse(path: str | os.PathLike, content: bytes) -> ClusterKey:
    """The key that a file's content says. Raises ClusterKeyError, with the path and without the content."""
    import zmq
    from zmq.utils import z85

    lines = [line.strip() for line in content.splitlines()]
    values = dict(line.partition(b"=")[::2] for line in lines if line and not line.startswith(b"#"))
    values = {name.strip(): value.strip() for name, value in values.items()}
    if len(content) > MAX_BYTES or values.keys() != {b"public", b"secret"}:
        raise ClusterKeyError(f"{path}: no cluster key, or a damaged one: a line 'public = ...' and one 'secret = ...'")
    key = ClusterKey(values[b"public"], values[b"secret"])
    if any(len(half) != 40 or not set(half) <= set(z85.Z85CHARS) for half in key):
        raise ClusterKeyError(f"{path}: a damaged cluster key: both halves have 40 characters; copy it once more")
    if zmq.curve_public(key.secret) != key.public:
        raise ClusterKeyError(f"{path}: a damaged cluster key: its halves do not belong together; copy it once more")
    return key


def _create(path: str | os.PathLike) -> ClusterKey:
    """As `create`, but FileExistsError where there is one already."""
    path, key = Path(path), generate()
    with _complaints(path), _temporary(path, key) as temporary:
        try:
            os.link(temporary, path)  # unlike renaming it fails where there is such a file
        except FileExistsError:
            raise
        except OSError:  # no hard links here, as on Android
            if os.path.lexists(path):
                raise FileExistsError from None
            os.rename(temporary, path)
    return key


@contextlib.contextmanager
def _temporary(path: Path, key: ClusterKey) -> Iterator[Path]:
    """A file beside ``path`` that holds the key, whole and on the disk; it is removed in the end."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "") from None
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(key.text.encode())
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def _complaints(path: str | os.PathLike) -> Iterator[None]:
    """Turn what the system says into ClusterKeyError, but for FileExistsError."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise ClusterKeyError(f"{path}: the cluster key cannot be written: {reason(error)}") from None


def _check_owner(path: str | os.PathLike, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise ClusterKeyError(f"{path}: this cluster key belongs to another user; make a copy of your own")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        command = f"chmod 600 {shlex.quote(str(path))}"
        raise ClusterKeyError(f"{path}: this cluster key is open to other users of the device; first: {command}")
