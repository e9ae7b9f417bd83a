"""Make the environment of mergekit-evolve: `python benchmarks/evolve/setup.py [FOLDER]`.

By default `.venv-evolve` beside the project's own; some minutes and 2 GB, once.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent.parent / ".venv-evolve"


def main() -> None:
    """Create the environment unless it is there, and install the pinned packages."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)  # first, so that no other package picks its build
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    print(python)


if __name__ == "__main__":
    main()
