"""The package stage of ``.ci/run``: what is in ``dist/``, and whether the wheel works by itself.

The wheel is installed into an environment of its own. Its dependencies are those of the environment
that runs this program, which lie behind it on the path (installing torch again takes minutes), so
pip checks every requirement of the wheel and installs what is missing. The editable installation of
the checkout is not visible there.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_UP = ("sfed/json_entry.pth", "sfed_script.pth")
"""The file that Python reads when it starts: its place in the checkout and in the wheel."""
DEMO = ("data.task=demo", "federated.num_rounds=1", "train.local_steps=1")
DEMO_CLIENTS = 8
ASK_PLACE = "import sfed; print(sfed.__file__)"


def main() -> None:
    """Check the newest files of ``dist/``.

    Raises:
        SystemExit: with what is wrong.
    """
    (wheel,), (sdist,) = (list((ROOT / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    tracked = tracked_files()
    check_wheel(wheel, tracked)
    check_sdist(sdist, tracked)
    with tempfile.TemporaryDirectory() as folder:
        check_same_wheel(wheel, Path(folder))
        check_installed(wheel, Path(folder))


def tracked_files() -> set[str]:
    """What git tracks and the working tree has."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def require_equal(what: str, found: set[str], expected: set[str]) -> None:
    """Compare the names of files."""
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        sys.exit(f"{what}: missing {missing}; not in the repository {surplus}")
    print(f"{what}: {len(found)} files, as expected")


def check_wheel(wheel: Path, tracked: set[str]) -> None:
    """The files of the package, the start-up file, the license, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    kept = ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    optional = {f"{metadata}/entry_points.txt"} & names
    package = {name for name in tracked if name.startswith("sfed/")} - {START_UP[0]}
    expected = package | {START_UP[1]} | {f"{metadata}/{name}" for name in kept} | optional
    require_equal(wheel.name, names, expected)


def check_sdist(sdist: Path, tracked: set[str]) -> None:
    """The files that git tracks, the metadata, and nothing else."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    require_equal(sdist.name, names, tracked | {"PKG-INFO"})


def check_same_wheel(wheel: Path, folder: Path) -> None:
    """``python -m build`` made the wheel from the sdist; the checkout makes the same one."""
    outdir = folder / "from-checkout"
    build = [sys.executable, "-m", "build", "--quiet", "--wheel"]
    subprocess.run([*build, "--outdir", outdir, ROOT], check=True)
    (other,) = outdir.iterdir()
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, other)}
    if len(digests) != 1 or other.name != wheel.name:
        sys.exit(f"{wheel.name}: the sdist and the checkout give different wheels")
    print(f"{wheel.name}: the sdist and the checkout give the same wheel")


def install(wheel: Path, folder: Path) -> Path:
    """Make the environment; returns its folder of programs."""
    venv.create(folder, with_pip=True, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    # A line of a .pth file extends the path; the .pth files over there are not read.
    behind = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in behind))
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # Without its requirements first: pip would take the editable installation for this very wheel.
    subprocess.run([*pip, "install", "-q", "--no-deps", "--force-reinstall", wheel], check=True)
    subprocess.run([*pip, "install", "-q", *constraints, wheel], check=True)
    subprocess.run([*pip, "check"], check=True)
    return folder / "bin"


def check_installed(wheel: Path, folder: Path) -> None:
    """The wheel answers for help and trains the demo, far from any checkout."""
    programs = install(wheel, folder / "environment")
    place = folder / "empty"
    place.mkdir()
    unset = {"PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HOME": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(program: str, *words: str) -> str:
        command = [str(programs / program), *words]
        print("+", program, *words, flush=True)
        done = subprocess.run(
            command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    imported = Path(run("python", "-c", ASK_PLACE).strip())
    if not imported.is_relative_to(programs.parent):
        sys.exit(f"sfed is imported from {imported}, not from the wheel")
    print(f"sfed is imported from {imported.relative_to(folder)}")
    if (programs / "sfed").is_file():
        print(run("sfed", "--version").strip())
        helped = run("sfed", "--help")
    else:
        helped = run("python", "-m", "sfed.train", "--help")
    if "usage" not in helped.lower():
        sys.exit("no help was printed")
    run("python", "-m", "sfed.train", *DEMO)
    written = (place / "runs" / "demo" / "adapters").glob("*/*.safetensors")
    adapters = [file for file in written if file.parent.name != "global"]
    if len(adapters) != DEMO_CLIENTS:
        sys.exit(f"the demo wrote {len(adapters)} adapters, not {DEMO_CLIENTS}")
    run("python", "-m", "sfed.report", "runs/demo")
    if not list((place / "runs" / "demo").rglob("*.html")):
        sys.exit("the report was not written")
    print(f"the demo trained: {len(adapters)} adapters and a report")


if __name__ == "__main__":
    main()
