"""Private API of other packages, one file a package: the only places that a new release of one of them can break.

Every entry says in which versions it was seen, its purpose, and what to do if it disappears. A test touches each entry.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from ..errors import OldPackageError

FLOORS = {"peft": "0.20", "transformers": "5.6", "accelerate": "1.11"}
"""{package: its oldest supported version}, as the package's metadata says too: what is older lacks entries."""


def require_floors() -> None:
    """Check that no package is too old, which would end in an import error of one of its names.

    Raises:
        OldPackageError: one is; the message has the pip command.
    """
    for package, floor in FLOORS.items():
        try:
            installed = version(package)
        except PackageNotFoundError:  # it is there without metadata, or its import says that it is missing
            continue
        if Version(installed) < Version(floor):
            raise OldPackageError(
                f"{package} {installed} is installed; sorsa-plugin needs {floor} or later. "
                f"Run: pip install --upgrade '{package}>={floor}'"
            )


require_floors()
