"""Where a project keeps its studies: `mlruns` with two SQLite files, artifacts, locks and work in progress."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpo.database import server_address, sqlite_address
from hpo.errors import StoreError, hide_secrets_of, shown_address

STORES = "hpo.toml"
_MOST_BYTES = 100_000  # of that file, which has two lines
_EXAMPLE = 'Write lines such as: storage = "postgresql://hpo@db/hpo" and tracking = "http://mlflow:5000"'


def cache_folder() -> Path:
    """HPO_DATA, else `hpo` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    own = os.environ.get("HPO_DATA")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hpo"
    return folder.expanduser().absolute()


@dataclass(frozen=True)
class Home:
    """The stores of one project. root is the absolute path of its `mlruns` folder.

    storage_url is Optuna's and tracking_uri is MLflow's; the two never share a database (both own `alembic_version`).
    """

    root: Path
    storage_url: str
    tracking_uri: str

    @classmethod
    def find(cls, home: str | Path | None = None) -> Home:
        """home, else HPO_HOME, else the working directory; `mlruns` is made inside it by create().

        HPO_STORAGE and MLFLOW_TRACKING_URI, or else `storage` and `tracking` in the folder's hpo.toml, replace the
        embedded SQLite files. Raises StoreError where that file says something else.
        """
        own = cls.at(home or os.environ.get("HPO_HOME") or Path.cwd())
        stores = _stores(own.root.parent / STORES)
        return cls(
            root=own.root,
            storage_url=_checked(
                server_address(os.environ.get("HPO_STORAGE") or stores.get("storage") or own.storage_url)
            ),
            tracking_uri=_checked(os.environ.get("MLFLOW_TRACKING_URI") or stores.get("tracking") or own.tracking_uri),
        )

    @classmethod
    def at(cls, folder: str | Path) -> Home:
        """The embedded stores of a folder, whatever the environment says."""
        root = Path(folder).expanduser().absolute() / "mlruns"
        return cls(root, sqlite_address(root / "optuna.db"), sqlite_address(root / "mlflow.db"))

    @property
    def artifacts(self) -> Path:
        """Artifacts and models of the embedded tracking store, one folder a study."""
        return self.root / "artifacts"

    @property
    def work(self) -> Path:
        """What running trials leave for the tracker; emptied as it is taken up."""
        return self.root / "work"

    @property
    def locks(self) -> Path:
        """Lock files: the system frees them when their process dies, however it dies."""
        return self.root / "locks"

    @property
    def reports(self) -> Path:
        """Pages and pictures that no --out names a place for; the working directory if this home is read-only."""
        return self.root / "reports" if not self.root.exists() or os.access(self.root, os.W_OK) else Path.cwd()

    @property
    def embedded(self) -> bool:
        """Whether MLflow writes to this folder's own SQLite file."""
        return self.tracking_uri == sqlite_address(self.root / "mlflow.db")

    @property
    def shared(self) -> bool:
        """Whether studies are kept on a server, for several machines."""
        return not self.storage_url.startswith("sqlite")

    def check_inside(self, path: Path) -> Path:
        """The path, which is about to be written or deleted. Raises StoreError where it is outside this home."""
        return check_inside(self.root, path)

    def create(self) -> Home:
        """Make the folders. Raises StoreError where that is not allowed, and for a name that MLflow cannot store."""
        if not str(self.root).isprintable():
            raise StoreError(
                f"{str(self.root)!a}: is no text that can be printed, and the stores keep it as one.",
                "Rename the folder, or choose another: --home DIR.",
            )
        for folder in (self.artifacts, self.work, self.locks):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise StoreError(
                    f"{folder}: cannot be written: {error.strerror}.",
                    "Choose a folder of your own: --home DIR, or the environment variable HPO_HOME.",
                ) from None
        return self


def is_store(folder: Path) -> bool:
    """Whether a folder is the `mlruns` of a home: it has a database, or the folders of one whose stores are on servers.

    MLflow's own `mlruns`, and a folder that is only called so, are not.
    """
    if folder.name != "mlruns":
        return False
    databases = any((folder / name).is_file() for name in ("optuna.db", "mlflow.db"))
    return databases or all((folder / name).is_dir() for name in ("artifacts", "work", "locks"))


def check_inside(folder: Path, path: Path) -> Path:
    """The path, which is about to be written or deleted. Raises StoreError where it is not below the folder.

    A folder that the user has replaced by a link (mlruns/artifacts on a larger disk) counts as inside.
    """
    below = Path(os.path.normpath(path))
    if below != folder and (below.is_relative_to(folder) or path.resolve().is_relative_to(folder.resolve())):
        return path
    raise StoreError(
        f"{path}: is outside {folder}, so it is neither written nor deleted.",
        "If the project was moved or copied, correct its addresses: hpo doctor --fix",
    )


def plain_file(path: Path) -> Path:
    """The path of a file that may be anybody's, about to be read. Raises OSError where it is a pipe or a device.

    These may never end, and a pipe that nobody writes to never begins.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
    return path


def remove(folder: Path, path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a file or a folder with all in it, below the folder. Raises StoreError where it is not below, OSError."""
    check_inside(folder, path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def _checked(url: str) -> str:
    """The address of a store, whose secrets are hidden from now on. Raises StoreError where its password would not be.

    A database takes what follows the first @ for the host, and a web address ends its login at / ? #: both would ask
    a name server for parts of the password, and tell them in errors.
    """
    password = url.partition("://")[2].rpartition("@")[0].partition(":")[2]
    wrong = set("@/?#") if url.startswith("http") else set("@")
    if not url.startswith("sqlite") and wrong & set(password):
        raise StoreError(
            f"{shown_address(url)}: the password in it has a sign that ends it.",
            "Write @ as %40, / as %2F, ? as %3F and # as %23 there.",
        )
    return hide_secrets_of(url)


def _stores(file: Path) -> Mapping[str, str]:
    """What the file says of the stores: addresses by name; {} where there is none."""
    try:
        if plain_file(file).stat().st_size > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"it has more than {_MOST_BYTES:,} bytes")
        stores = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StoreError(
            f"{file}: cannot be read: {error}.", 'Write lines such as: storage = "postgresql://..."'
        ) from None
    for name, value in stores.items():
        if name not in ("storage", "tracking") or not isinstance(value, str):
            # Without the value: it may hold a password.
            raise StoreError(f"{file}: {name}: is not storage or tracking, or not a text.", _EXAMPLE)
    return stores
