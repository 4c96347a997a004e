"""Each extra in an environment of its own: ``python -m tests.support.extras_alone [EXTRA …]`` (``make extras``).

Installs the package with one extra into a new virtual environment, looks with ``pip check`` whether all there is
fits together, and whether torch and jax stay out of where they do not belong. Needs a package index, several
gigabytes and minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch": {"train", "export", "behavior", "all", "dev"}, "jax": {"smax", "all", "dev"}}


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = sys.argv[1:] or [extra for extra in project["optional-dependencies"] if extra != "dev"]
    failed = [extra for extra in extras if not _fits(extra)]
    print(f"{len(extras) - len(failed)} of {len(extras)} extras fit alone", *failed)
    return bool(failed)


def _fits(extra: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check"]
        bound = ["install", "-c", str(ROOT / "constraints.txt")]
        if extra in HEAVY["torch"]:  # by name: a free choice brings several gigabytes of CUDA
            subprocess.run([*pip, *bound, "torch"], check=True)
        subprocess.run([*pip, *bound, f"{ROOT}[{extra}]"], check=True)
        fits = subprocess.run([*pip, "check"], check=False).returncode == 0
        for package, homes in HEAVY.items():
            imported = subprocess.run(
                [str(python), "-c", f"import {package}"], check=False, capture_output=True
            )
            if imported.returncode == 0 and extra not in homes:
                print(f"{extra} brings {package}")
                fits = False
    print(f"{extra}: {'fits' if fits else 'does not fit'}", flush=True)
    return fits


if __name__ == "__main__":
    sys.exit(main())
