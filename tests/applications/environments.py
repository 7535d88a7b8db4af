"""A virtual environment and the unpacked sources for each application."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .table import Application

ROOT = Path(__file__).parents[2]
"""The checkout of this package."""


class CannotInstall(Exception):
    """An application can't be installed; its text is the reason, in one line."""


@dataclass(frozen=True)
class Installed:
    """An application that is ready to be tested."""

    application: Application
    python: Path
    """The Python of its environment."""
    sources: Path
    """Its sources, which a run copies before it changes anything."""


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this package, which each environment gets."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(application: Application, wheel: Path, folder: Path, source: Path | None) -> Installed:
    """Install an application, with its tests' requirements and this package beside it.

    An environment that is there already, from the same requirements, gets the new wheel alone.

    :param wheel: This package, from :func:`build_wheel`.
    :param folder: Where the environment and the sources are put.
    :param source: The sources, if the user has them; else the sdist is downloaded.
    :raises CannotInstall: If pip can't, or if there is no Python that is new enough.
    """
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    stamp = folder / "installed"
    wanted = "\n".join([application.title, *application.extras, *application.requires])
    if not stamp.exists() or stamp.read_text() != wanted or source is not None:
        stamp.unlink(missing_ok=True)
        _call(_interpreter(application.python), "-m", "venv", "--clear", str(folder / "venv"))
        # That of an older Python resolves the requirements many times slower.
        _pip(python, "install", "--upgrade", "pip")
        source = source or _unpacked(_downloaded(application, python, folder), folder)
        requirements = [f"{wheel}[flask]", *application.requires]
        # A checkout may be no package: then it is only copied, as each is.
        if any((source / name).exists() for name in ("pyproject.toml", "setup.py")):
            extras = f"[{','.join(application.extras)}]" if application.extras else ""
            requirements.append(f"{source}{extras}")
        _pip(python, "install", *requirements)
        (folder / "source").write_text(str(source))
        stamp.write_text(wanted)
    else:
        _pip(python, "install", "--no-deps", "--force-reinstall", str(wheel))
    return Installed(application, python, Path((folder / "source").read_text()))


def _interpreter(lowest: str) -> str:
    """This Python, or the oldest on the PATH that an application can be installed on."""
    needed = tuple(map(int, lowest.split(".")))
    if sys.version_info >= needed:
        return sys.executable
    for minor in range(needed[1], needed[1] + 5):
        found = shutil.which(f"python3.{minor}")
        # A launcher may be there for a Python that is not chosen, and then it fails.
        if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return found
    raise CannotInstall(f"it needs Python {lowest}, and there is none on the PATH")


def _downloaded(application: Application, python: Path, folder: Path) -> Path:
    """Fetch the sdist with pip, from the index that pip is set up for."""
    sdists = folder / "sdist"
    shutil.rmtree(sdists, ignore_errors=True)
    requirement = f"{application.name}=={application.version}"
    arguments = ["--no-deps", "--no-binary", application.name, "--dest", str(sdists)]
    _pip(python, "download", *arguments, requirement)
    (sdist,) = sdists.iterdir()
    return sdist


def _unpacked(sdist: Path, folder: Path) -> Path:
    sources = folder / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.unpack_archive(sdist, sources, filter="data")
    (source,) = sources.iterdir()
    return source


def _pip(python: Path, command: str, *arguments: str) -> None:
    _call(str(python), "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall(_reason(done.stderr) or f"{command[0]} ended with {done.returncode}")


def _reason(said: str) -> str:
    """What pip says first about an error, without the colours and in one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    # It says first, and as an error, too, which versions it did not look at.
    errors = [
        line
        for line in plain.splitlines()
        if re.match(r"\s*(ERROR|error)\b(?!: Ignored the following)", line)
    ]
    return " ".join((errors or plain.splitlines()[-1:] or [""])[0].split())
