"""Run the installed PEFT's own tests for `SORSAConfig`; exit code 0 when nothing failed that was not expected to.

    python tests/peft_conformance/run.py [-k NAME and other pytest arguments]
    python tests/peft_conformance/run.py --borrowed    the survey of `borrowed.py`

PEFT's source distribution on PyPI holds its tests. It is fetched with pip, once per version, into `.peft_conformance/`
of this clone (or PEFT_CONFORMANCE_CACHE).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def fetch_tests(cache: Path) -> Path:
    """The directory that holds `tests/` of the installed PEFT."""
    name = f"peft-{version('peft')}"
    source = cache / name
    if not (source / "tests").is_dir():
        archive = cache / f"{name}.tar.gz"
        if not archive.exists():
            what = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", cache, name.replace("-", "==")]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *what], check=True)
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if member.name.startswith(f"{name}/tests/")]
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)  # new in Python 3.11.4
            tar.extractall(cache, members)
    (source / "tests" / "__init__.py").touch()  # the distribution lacks it, and the tests import one another
    return source


def main() -> int:
    """Fetch the tests and run pytest on them; its exit code."""
    cache = Path(os.environ.get("PEFT_CONFORMANCE_CACHE", ROOT / ".peft_conformance"))
    cache.mkdir(parents=True, exist_ok=True)
    source = fetch_tests(cache)
    sys.path.insert(0, str(ROOT / "tests"))
    from peft_conformance.cases import BORROWED_FILES, FILES

    arguments = sys.argv[1:]
    borrowed = "--borrowed" in arguments
    if borrowed:
        arguments.remove("--borrowed")

    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PEFT_CONFORMANCE_MODELS": str(cache / "models"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
    }
    nothing_of_ours = ["--rootdir", str(source), "-c", os.devnull, "-p", "no:cacheprovider"]
    output = ["-q", "-W", "ignore", "--tb=short", "-rfExX"]
    plugin = "peft_conformance.borrowed" if borrowed else "peft_conformance.plugin"
    files = [str(source / "tests" / file) for file in (BORROWED_FILES if borrowed else FILES)]
    command = [sys.executable, "-m", "pytest", "-p", plugin, *nothing_of_ours, *output, *files]
    return subprocess.run([*command, *arguments], cwd=source, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
