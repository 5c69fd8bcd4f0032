"""The Ed25519 key of this installation, with which sidecars of samples are signed.

It is made at the first use, in ${XDG_CONFIG_HOME:-~/.config}/megasora/signing_key.pem, readable by its user only.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megasora.errors import MegaSoraError
from megasora.files import read_regular_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM = "Ed25519"
MAX_KEY_BYTES = 1 << 14


def key_path() -> Path:
    """Where the key is, or will be. Raises OSError for a user without a home folder, as in some containers."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    if config.startswith("~"):
        raise OSError(errno.ENOENT, "this user has no home folder; set XDG_CONFIG_HOME to a folder for the signing key")
    return Path(config) / "megasora" / "signing_key.pem"


def load_key(path: Path) -> Ed25519PrivateKey:
    """The key of a file. Raises MegaSoraError if it is none, OSError if it cannot be read."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_regular_file(path, MAX_KEY_BYTES), password=None)
    except ValueError as error:
        raise MegaSoraError(f"{path} is no private key ({error}); move it away, and a new one is made") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise MegaSoraError(f"{path} is no {ALGORITHM} key; move it away, and a new one is made")
    return key


def installation_key() -> Ed25519PrivateKey:
    """The key of this installation, made if there is none. Processes that make it at once get the same one.

    Raises OSError where it cannot be written.
    """
    path = key_path()
    if not path.exists():
        make_key(path)
    return load_key(path)


def make_key(path: Path) -> None:
    """Writes a new key, unless there is one by then."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".signing_key.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # fails if another process was first
        except FileExistsError:
            pass
    finally:
        os.unlink(temporary)


def public_key_of(key: Ed25519PrivateKey) -> str:
    """Its public key, 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def is_signed_by(public_key: str, signature: str, message: bytes) -> bool:
    """Whether `signature` (hexadecimal) is of `message`, by the owner of `public_key`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True
