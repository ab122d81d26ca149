"""The native library as a file and as machine code: what it needs, what sanitizers say, threads."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from child import child_environment
from native_calls import calls
from threads import using_threads
from tiles import tile_sets
from torch import Tensor

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "realera_fast"
NATIVE = PACKAGE / "_C.abi3.so"
INCLUDE = Path(torch.__file__).parent / "include"

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
built = pytest.mark.skipif(not NATIVE.exists(), reason="the native library is not built")


# --- What the library needs --------------------------------------------------------------------


@dataclass(frozen=True)
class Symbol:
    """A symbol that a library takes from others."""

    name: str
    weak: bool = False
    origin: str | None = None
    """The file that the linker found it in, known only for files that give their symbols versions
    (glibc, libstdc++ and libgcc do, torch doesn't)."""


def undefined(path: Path) -> tuple[list[Symbol], list[str]]:
    """Reads a 64-bit little-endian ELF library: its undefined symbols, and the files it names."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is not a 64-bit little-endian ELF file"
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    # Of each section: type, offset, size, number of the section with its strings.
    sections = [struct.unpack_from("<4xI16xQQI", data, start + i * size) for i in range(count)]

    def text(section: int, offset: int) -> str:
        begin = sections[section][1] + offset
        return data[begin : data.index(b"\0", begin)].decode()

    versions: list[int] = []
    origins: dict[int, str] = {}
    for kind, offset, length, link in sections:
        if kind == 0x6FFFFFFF:  # SHT_GNU_versym: a number for each symbol
            versions = [v & 0x7FFF for (v,) in struct.iter_unpack("<H", data[offset:][:length])]
        elif kind == 0x6FFFFFFE:  # SHT_GNU_verneed: which file those numbers stand for
            entry = offset
            while True:
                _, parts, file, first, onward = struct.unpack_from("<HHIII", data, entry)
                part = entry + first
                for _ in range(parts):
                    _, _, number, _, step = struct.unpack_from("<IHHII", data, part)
                    origins[number] = text(link, file)
                    part += step
                if onward == 0:
                    break
                entry += onward
    symbols, needed = [], []
    for kind, offset, length, link in sections:
        if kind == 11:  # SHT_DYNSYM
            entries = struct.iter_unpack("<IBxHQQ", data[offset : offset + length])
            for i, (name, info, section, _, _) in enumerate(entries):
                if section == 0 and name != 0:
                    number = versions[i] if versions else 0
                    symbols.append(Symbol(text(link, name), info >> 4 == 2, origins.get(number)))
        elif kind == 6:  # SHT_DYNAMIC
            for tag, value in struct.iter_unpack("<QQ", data[offset : offset + length]):
                if tag == 1:  # DT_NEEDED
                    needed.append(text(link, value))
                assert tag not in (15, 29), f"{path} has an rpath: {text(link, value)}"
                if tag == 0:
                    break
    return symbols, needed


@dataclass(frozen=True)
class Shim:
    """A C function of torch's stable ABI."""

    cuda: bool
    """Only a torch with CUDA has it."""
    since: tuple[int, int]
    """The first torch that has it, as far as the headers say."""


def shims() -> dict[str, Shim]:
    """The C functions that the installed torch declares for extensions."""
    found: dict[str, Shim] = {}
    for header in (
        "torch/csrc/stable/c/shim.h",
        "torch/csrc/inductor/aoti_torch/c/shim.h",
        # Operators with Scalar arguments, and what stable/ops.h calls itself.
        "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",
        "torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h",
    ):
        stack: list[str] = []
        pending = ""
        for line in (INCLUDE / header).read_text().splitlines():
            word = line.replace("# ", "#").split(" ")[0]
            if word in ("#if", "#ifdef", "#ifndef"):
                stack.append(line)
            elif word in ("#else", "#elif"):
                stack[-1] = line
            elif word == "#endif":
                stack.pop()
            if line.startswith("#"):
                continue
            pending = (pending if pending else "") + line + "\n"
            for match in re.finditer(r"AOTI_TORCH_EXPORT\b[^;(]*?\b(\w+)\s*\(", pending):
                conditions = "\n".join(stack)
                gates = re.findall(r"FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", conditions)
                since = max([(int(a), int(b)) for a, b in gates], default=(2, 9))
                found[match[1]] = Shim("USE_CUDA" in conditions, since)
            if "AOTI_TORCH_EXPORT" not in pending or re.search(r"[;({]", pending):
                pending = ""
    return found


SYSTEM = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux[\w-]*)\.so.*")
TORCH = {"libtorch.so", "libtorch_cpu.so"}


def strange(
    symbols: Iterable[Symbol], known: dict[str, Shim], target: tuple[int, int]
) -> dict[str, str]:
    """The symbols that the library must not need, and why."""
    wrong = {}
    for symbol in symbols:
        name = symbol.name
        if symbol.origin is not None:
            if not SYSTEM.fullmatch(symbol.origin):
                wrong[name] = f"is from {symbol.origin}"
        elif name in known:
            if known[name].since > target:
                wrong[name] = f"needs torch {known[name].since}"
            elif known[name].cuda and not symbol.weak:
                wrong[name] = "is missing from a torch without CUDA, so it must be weak"
        elif not (symbol.weak and name.startswith(("_ITM_", "__gmon_start__"))):
            wrong[name] = "is neither of the system's libraries nor of torch's stable ABI"
    return wrong


def target() -> tuple[int, int]:
    """The oldest torch that the library is built for."""
    (value,) = re.findall(
        r"TORCH_TARGET_VERSION=0x([0-9a-f]+)", (ROOT / "CMakeLists.txt").read_text()
    )
    return int(value, 16) >> 56, int(value, 16) >> 48 & 0xFF


@linux
class TestNeeds:
    def test_headers_are_understood(self) -> None:
        known = shims()
        assert known["torch_call_dispatcher"] == Shim(False, (2, 10))
        assert known["aoti_torch_get_dtype"] == Shim(False, (2, 9))
        assert known["aoti_torch_get_current_cuda_stream"] == Shim(True, (2, 9))
        assert known["torch_c10_cuda_check_msg"] == Shim(True, (2, 10))
        assert target() == (2, 10)

    def test_strange_symbols_are_found(self) -> None:
        known = shims()
        good = [
            Symbol("torch_call_dispatcher"),
            Symbol("aoti_torch_get_current_cuda_stream", weak=True),
            Symbol("memcpy", origin="libc.so.6"),
            Symbol("__tls_get_addr", origin="ld-linux-x86-64.so.2"),
            Symbol("_Znwm", origin="libstdc++.so.6"),
            Symbol("_ITM_registerTMCloneTable", weak=True),
        ]
        bad = [
            Symbol("_ZN3c105ErrorC1ESs"),
            Symbol("_ZN2at6detail13empty_genericEv"),
            Symbol("_ZN5torch7LibraryD1Ev", weak=True),
            Symbol("dgemm_"),
            Symbol("PyLong_FromLong"),
            Symbol("GOMP_parallel", origin="libgomp.so.1"),
            Symbol("aoti_torch_get_current_cuda_stream"),
            Symbol("torch_call_dispatcher_of_tomorrow"),
        ]
        assert not strange(good, known, (2, 10))
        assert list(strange(bad, known, (2, 10))) == [symbol.name for symbol in bad]
        later = {"new": Shim(False, (2, 11))}
        assert strange([Symbol("new")], later, (2, 10))
        assert not strange([Symbol("new")], later, (2, 11))

    @built
    def test_symbols(self) -> None:
        symbols, _ = undefined(NATIVE)
        assert {"torch_call_dispatcher", "torch_library_impl"} <= {s.name for s in symbols}
        assert not strange(symbols, shims(), target())

    @built
    def test_files(self) -> None:
        _, needed = undefined(NATIVE)
        # Named, because `import torch` loads its libraries with local scope.
        assert set(needed) >= TORCH
        assert [n for n in needed if n not in TORCH and not SYSTEM.fullmatch(n)] == []

    @built
    @pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
    def test_the_reader_agrees_with_nm(self) -> None:
        text = subprocess.run(
            ["nm", "-D", "--undefined-only", NATIVE], capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split() for line in text.splitlines()]
        symbols, _ = undefined(NATIVE)
        assert {(s.name, s.weak) for s in symbols} == {
            (name.split("@")[0], kind in "wv") for kind, name in rows
        }
        versioned = {name.split("@")[0] for _, name in rows if "@" in name}
        assert {s.name for s in symbols if s.origin is not None} == versioned


# --- Sanitizers --------------------------------------------------------------------------------

FAULTS = """
#include <climits>
extern "C" int beyond_array(int n) {
  volatile int* values = new int[n];
  for (int i = 0; i <= n; ++i) values[i] = i;
  return values[0];
}
extern "C" float beyond_tensor(const float* values, int n) { return values[n]; }
extern "C" int overflow(int n) { return INT_MAX + n; }
extern "C" int fine(int n) { return n; }
"""


@dataclass(frozen=True)
class Sanitized:
    """A copy of the package with the library built under sanitizers."""

    folder: Path
    flags: list[str]
    """What CMake gave the compiler for it."""
    compiler: str
    preload: str

    def run(self, *command: str | Path, threads: int = 1) -> tuple[int, str, str]:
        """Runs Python with the sanitizers' runtimes: exit status, output, output from a report on.

        Pytest inside must leave file descriptors alone, or it swallows the reports.
        """
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
            # The runtimes must be there before everything else, and Python isn't linked to them.
            "LD_PRELOAD": self.preload,
            # Python and torch keep a lot of memory until the process ends: leaks say nothing.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(threads),
            # Threads that wait for work would spin, for most of the time that is spent here.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        result = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        output = result.stdout + result.stderr
        found = re.search(r"==\d+==ERROR: |^.*: runtime error: |^SUMMARY: ", output, re.MULTILINE)
        return result.returncode, output, output[found.start() :] if found else ""


@dataclass(frozen=True)
class Build:
    """A wheel that was built of the sources here, under sanitizers where the compiler has them."""

    wheel: Path
    commands: list[str]
    """What CMake called the compiler with."""
    compiler: str | None
    runtimes: list[str]
    """Of the sanitizers; empty: they are not in it."""


def sanitizer_runtimes(compiler: str | None) -> list[str]:
    if sys.platform != "linux" or compiler is None:
        return []
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # AddressSanitizer must find the function that throws exceptions: libstdc++ comes along.
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return found if all(os.path.isabs(path) for path in found) else []


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds the wheel from a copy, once for all that is asked of it."""
    source = tmp_path_factory.mktemp("build") / "source"
    ignore = shutil.ignore_patterns(".*", "build", "out", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    paths = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    compiler = shutil.which("g++", path=paths)
    runtimes = sanitizer_runtimes(compiler)
    # The CUDA part was compiled when this environment was made.
    options = ["-DREALERA_FAST_CUDA=OFF"]
    if runtimes:
        options += [
            f"-DCMAKE_CXX_COMPILER={compiler}",
            "-DREALERA_FAST_SANITIZE=address,undefined",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        ]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            source.parent,
            source,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": paths, "CMAKE_ARGS": shlex.join(options)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = source.parent.glob("*.whl")
    commands = [
        entry["command"]
        for path in source.rglob("compile_commands.json")
        for entry in json.loads(path.read_text())
    ]
    return Build(wheel, commands, compiler, runtimes)


def test_wheel(build: Build) -> None:
    assert "-abi3-" in build.wheel.name
    with zipfile.ZipFile(build.wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"realera_fast"}
    shipped = {name.removeprefix("realera_fast/") for name in names}
    assert {"_C.abi3.so", "py.typed", "kernels/perturb.py"} <= shipped
    data = {
        str(path.relative_to(PACKAGE))
        for path in (PACKAGE / "embedded").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert data <= shipped


@pytest.fixture(scope="module")
def sanitized(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    """The package with the library under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not build.runtimes or build.compiler is None:
        pytest.skip("needs Linux and a g++ with sanitizer runtimes")
    folder = tmp_path_factory.mktemp("sanitized")
    # The package as links, and beside them the library: registry.py loads the one of its package.
    package = folder / "realera_fast"
    package.mkdir()
    for path in PACKAGE.iterdir():
        if path.name not in (NATIVE.name, "__pycache__"):
            (package / path.name).symlink_to(path)
    with zipfile.ZipFile(build.wheel) as archive:
        (package / NATIVE.name).write_bytes(archive.read(f"realera_fast/{NATIVE.name}"))
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests" / "support", folder / "tests" / "support", ignore=ignore)
    for name in SANITIZED:
        (folder / "tests" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    kept = {"-g1", "-O1"}
    flags = [
        {w for w in command.split() if w.startswith(("-fsanitize", "-fno-")) or w in kept}
        for command in build.commands
    ]
    common = sorted(set.intersection(*flags))
    return Sanitized(folder, common, build.compiler, ":".join(build.runtimes))


SANITIZED = (
    "conftest.py",
    "ops/test_ops.py",
    "solver/test_hostile_numerics.py",
    "ops/test_perturb_reference.py",
)
"""Tests that run in the instrumented library."""


class TestSanitizers:
    def test_every_source_is_instrumented(self, sanitized: Sanitized) -> None:
        assert {
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
            *("-fno-omit-frame-pointer", "-g1", "-O1"),
        } <= set(sanitized.flags)
        symbols, _ = undefined(sanitized.folder / "realera_fast" / NATIVE.name)
        names = {symbol.name for symbol in symbols}
        assert "__asan_init" in names
        assert any(name.startswith("__ubsan_handle_") for name in names)
        # And the check of symbols sees what doesn't belong.
        assert "__asan_init" in strange(symbols, shims(), target())

    @pytest.mark.parametrize(
        ("call", "report"),
        [
            ("fine(4)", ""),
            ("beyond_array(4)", "heap-buffer-overflow"),
            # Torch's own memory is watched too: most of what the kernels touch is that.
            ("beyond_tensor(c_void_p(torch.zeros(16).data_ptr()), 16)", "heap-buffer-overflow"),
            ("overflow(1)", "signed integer overflow"),
        ],
    )
    def test_planted_faults_are_reported(
        self, call: str, report: str, sanitized: Sanitized
    ) -> None:
        source, library = sanitized.folder / "faults.cpp", sanitized.folder / "faults.so"
        if not library.exists():
            source.write_text(FAULTS)
            subprocess.run(
                [sanitized.compiler, "-shared", "-fPIC", *sanitized.flags, source, "-o", library],
                check=True,
            )
        code = (
            "import torch; from ctypes import CDLL, c_void_p\n"
            f"CDLL({str(library)!r}).{call}; print('went on')"
        )
        status, output, reports = sanitized.run("-c", code)
        if report:
            assert status != 0 and report in reports and "went on" not in output, output
            assert call.split("(")[0] in reports
        else:
            assert (status, reports) == (0, "") and "went on" in output, output

    @pytest.mark.parametrize("threads", [1, 2])
    def test_the_operations_are_clean(self, threads: int, sanitized: Sanitized) -> None:
        # One thread runs everything; with two only what divides the work differently, which is the
        # same for every set of loops.
        chosen = [f"tests/{name}" for name in SANITIZED[1:]]
        chosen += ["-k", "not opcheck"]
        if threads > 1:
            chosen = ["tests/ops/test_ops.py", "-k", "baseline and (sums or update or batch)"]
        code = (
            "import sys, pytest; from realera_fast import ops\n"
            "print('using', ops.__file__, ops.implementations(), flush=True)\n"
            "sys.exit(pytest.main(sys.argv[1:]))"
        )
        status, output, reports = sanitized.run(
            *(
                "-c",
                code,
                "-q",
                "-p",
                "no:cacheprovider",
                "-m",
                "not gpu",
                "--capture=sys",
                *chosen,
            ),
            threads=threads,
        )
        assert not reports, reports[:10_000]
        assert status == 0, output[-10_000:]
        path, found = re.findall(r"using (.*?) ({.*})", output)[0]
        assert path == str(sanitized.folder / "realera_fast" / "ops" / "__init__.py")
        assert ast.literal_eval(found)["solve_spd"]["cpu"] == "native"
        assert int(re.findall(r"(\d+) passed", output)[-1]) > 20


# --- Threads -----------------------------------------------------------------------------------


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        found.update(ctypes.string_at(plain.data_ptr(), plain.nbytes))
    return found.hexdigest()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's number of threads, for a test."""
    with using_threads(request.param):
        yield request.param


class TestThreads:
    def test_calls_at_the_same_time(self, threads: int) -> None:
        chosen = calls()
        serial = {name: digest(call()) for name, call in chosen.items()}
        assert len(set(serial.values())) == len(chosen)
        names = list(chosen) * 4
        # OpenMP keeps the number of threads for each thread that calls it.
        with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            results = list(pool.map(lambda name: digest(chosen[name]()), names))
        assert [n for n, got in zip(names, results, strict=True) if got != serial[n]] == []

    @built
    def test_results_do_not_depend_on_the_number_of_threads(self, tmp_path: Path) -> None:
        code = (
            "import sys, torch\n"
            "from native_calls import calls\n"
            "results = {name: call() for name, call in calls().items()}\n"
            "torch.save((torch.get_num_threads(), results), sys.argv[1])"
        )
        found = []
        for count in (1, 2):
            # MKL would use fewer threads than it is told to where it finds fewer cores.
            environment = child_environment(OMP_NUM_THREADS=str(count), MKL_DYNAMIC="FALSE")
            environment.pop("MKL_NUM_THREADS", None)
            result = subprocess.run(
                [sys.executable, "-c", code, tmp_path / "results"],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 0, result.stderr
            used, results = torch.load(tmp_path / "results")
            assert used == count
            found.append(results)
        assert list(found[0]) == list(found[1]) == list(calls())
        for name, one in found[0].items():
            for a, b in zip(one, found[1][name], strict=True):
                if name.startswith("solve_spd"):
                    # LAPACK's factorisation is torch's, and MKL divides it as it likes.
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
                else:
                    assert torch.equal(a, b), name

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_streams(self) -> None:
        chosen = calls("cuda")
        serial = {name: digest(call()) for name, call in chosen.items()}
        streams = [torch.cuda.Stream() for _ in range(4)]
        results = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Nothing waits here: the streams overlap.
                results.append({name: call() for name, call in chosen.items()})
        torch.cuda.synchronize()
        for result in results:
            wrong = [name for name, got in result.items() if digest(got) != serial[name]]
            assert wrong == []


@built
class TestTileSets:
    """The hook by which the suite runs the loops of every instruction set."""

    def test_the_best_one_is_used_and_another_can_be_asked_for(self) -> None:
        names = tile_sets()
        assert names[0] == "baseline" and len(set(names)) == len(names)
        use = torch.ops.realera_fast._use_tile_set
        assert use(names[0]) == names[-1]
        assert use(names[-1]) == names[0]

    @pytest.mark.parametrize("name", ["", "neon2", "AVX2"])
    def test_an_unknown_one_is_refused(self, name: str) -> None:
        with pytest.raises(RuntimeError, match=r"name: expected a tile set .*\(baseline.*got"):
            torch.ops.realera_fast._use_tile_set(name)
        names = tile_sets()
        assert torch.ops.realera_fast._use_tile_set(names[-1]) == names[-1]
