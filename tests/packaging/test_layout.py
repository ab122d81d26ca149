"""The shape of the package: rooms in one line, what an import costs, what is public and built."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import realera_fast
from realera_fast import ops

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "realera_fast"

ROOMS = (
    "runtime",
    "ops",
    "solver",
    "text",
    "models",
    "erasure",
    "unet",
    "mining",
    "alignment",
    "eraser",
    "evaluation",
    "embedded",
    "cli",
)
"""Each room imports only what stands left of it. "eraser" are the modules beside the folders."""

HEAVY = ("diffusers", "transformers", "peft", "accelerate", "triton", "typer", "PIL", "numpy")
"""What the package may name only inside functions, but in the rooms and modules below."""
LAZY_EXCEPT = {
    "evaluation": {"numpy", "PIL"},
    "embedded": {"numpy", "PIL"},
    "cli": {"typer", "numpy", "PIL"},
}

LONG_FILES = {
    "kernels/project.py": "one op: its plan, its kernels and its gradient share their shapes",
    "realera_fast/text/encoders.py": "one class: what a text encoder and its tokenizer answer",
}
"""Files over 500 lines, and why. Test files are as long as the list of what they hold."""
LONG_BODIES: dict[str, str] = {}
"""Functions over 80 lines without their docstring, and why."""


def modules() -> list[Path]:
    """Every module of the package, however deep. `kernels` is a link to a folder of its own."""
    return sorted(
        path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts
    )


EVERY = modules()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "eraser"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Modules that are imported, each with the names that are taken of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that the statements import, those of `from a import b` as "a" and "a.b"."""
    names: set[str] = set()
    for module, taken in imports(tree):
        names |= {module, *(f"{module}.{name}" for name in taken)}
    return names


def at_import(tree: ast.Module) -> set[str]:
    """What is imported when the module is: functions' bodies and `if TYPE_CHECKING` left out."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            names |= imported(node)
    return names


def run(code: str, cwd: Path) -> str:
    """Runs Python code in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders - {"kernels"} == set(ROOMS) - {"eraser"}
    assert len(EVERY) > 80, "the folders were not looked into"


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_a_room_sees_only_rooms_left_of_it(path: Path) -> None:
    here = room_of(path)
    for module, taken in imports(tree_of(path)):
        parts = module.split(".")
        if parts[0] != "realera_fast" or path == PACKAGE / "__main__.py":
            continue
        if parts[1:2] == ["kernels"]:
            # No room: the test below says who may name them.
            continue
        rooms = [parts[1]] if len(parts) > 1 else taken
        for room in rooms:
            room = room if room in ROOMS else "eraser"
            if path == PACKAGE / "__init__.py" or room == here:
                continue
            assert ROOMS.index(room) < ROOMS.index(here), f"{here} imports {room}: {module}"
            assert len(parts) < 3, f"{module}: import of its room, from realera_fast.{room}"


@pytest.mark.parametrize("room", [r for r in ROOMS if r != "eraser"])
def test_a_face_offers_what_it_names(room: str) -> None:
    face = importlib.import_module(f"realera_fast.{room}")
    assert face.__doc__ and list(face.__all__) == sorted(set(face.__all__))
    for name in face.__all__:
        assert hasattr(face, name), name


def test_only_the_registry_names_the_native_code_and_the_kernels() -> None:
    for path in EVERY:
        if path == PACKAGE / "ops" / "registry.py":
            continue
        tree = tree_of(path)
        named = {
            n for n in imported(tree) if n.startswith(("realera_fast.kernels", "torch.library"))
        }
        assert not named, f"{name_of(path)} imports {named}"
        # The room calls the operations that its registry registers.
        assert room_of(path) == "ops" or "torch.ops.realera_fast" not in ast.unparse(tree), path


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_heavy_libraries_are_imported_lazily(path: Path) -> None:
    roots = {target.split(".")[0] for target in at_import(tree_of(path))}
    assert not roots & set(HEAVY) - LAZY_EXCEPT.get(room_of(path), set())


def test_nothing_imports_peft() -> None:
    users = [path for path in EVERY for n in imported(tree_of(path)) if n.startswith("peft")]
    assert not users, "adapters are written in its format, factors are trained without it"


def test_kernels_stand_below_the_operations() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        ours = {n for n in imported(tree_of(path)) if n.startswith("realera_fast")}
        # They may name what they must agree with bit for bit, and nothing above it.
        allowed = ("", ".ops", ".ops.philox", ".ops.perturb_reference")
        assert {".".join(n.split(".")[:3]) for n in ours} <= {
            f"realera_fast{n}" for n in allowed
        }, path


def bodies(tree: ast.Module, name: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods by qualified name; those inside functions count with these."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from bodies(node, f"{name}{node.name}.")  # type: ignore[arg-type]
        elif isinstance(node, ast.FunctionDef):
            yield f"{name}{node.name}", node


def body_lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first.end_lineno + 1 if documented and first.end_lineno else first.lineno
    return (function.end_lineno or start) - start + 1


def sources() -> list[Path]:
    """All Python that the project is written in, but for its tests."""
    folders = ("kernels", "bench", "tools")
    return [*EVERY, *(p for f in folders for p in sorted((ROOT / f).rglob("*.py")))]


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_sizes(path: Path) -> None:
    name = name_of(path)
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert (lines > 500) == (name in LONG_FILES), f"{name}: {lines} lines"
    for function, node in bodies(tree_of(path)):
        where = f"{name}:{function}"
        assert (body_lines(node) > 80) == (where in LONG_BODIES), f"{where}: {body_lines(node)}"


def test_exceptions_of_size_exist() -> None:
    known = {name_of(path) for path in sources()}
    assert set(LONG_FILES) <= known
    assert {where.split(":")[0] for where in LONG_BODIES} <= known


def test_no_environment_variables_and_no_print() -> None:
    for path in EVERY:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("os.environ", "os.getenv"), path
            if isinstance(node, ast.Call) and room_of(path) != "cli":
                assert ast.unparse(node.func) != "print", path


def test_import_is_lean(tmp_path: Path) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import realera_fast\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}"
        f" & {set(HEAVY) - {'numpy'}!r}), torch.cuda.is_initialized())"
    )
    assert run(code, tmp_path) == "[] False"


def test_public_names() -> None:
    names = realera_fast.__all__
    assert names == sorted(names) and len(set(names)) == len(names)
    for name in names:
        assert hasattr(realera_fast, name), name
    assert set(names) <= set(dir(realera_fast))
    public = {
        name
        for name in dir(realera_fast)
        if not name.startswith("_") and not isinstance(getattr(realera_fast, name), ModuleType)
    }
    assert public - {"TYPE_CHECKING"} == set(names) - {"__version__"}
    # Rooms are there without an import of their own.
    assert all(isinstance(getattr(realera_fast, room), ModuleType) for room in ROOMS)


def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    """Help and wrong usage answer before anything heavy is imported."""
    for arguments in (
        ["--help"],
        ["erase", "--help"],
        ["erase", "embedded", "-o", "x"],
        ["erase", "embedded", "-c", "cat", "-o", "x", "--device", "gpu"],
        ["erase", "embedded", "-c", "cat", "-o", "x", "--dtype", "int8"],
        ["erase", "embedded", "-c", "cat", "-o", "x", "--kind", "brand"],
        ["erase", "embedded", "-c", "cat", "-o", "x", "--save", "all"],
        ["verify", "embedded", "delta", "-o", "x", "--seeds", "one"],
        ["apply"],
        ["nothing"],
    ):
        code = (
            "import sys; from realera_fast import cli\n"
            f"code = cli.program.run({arguments!r})\n"
            "print(code, 'torch' in sys.modules)"
        )
        wanted = 0 if "--help" in arguments else 2
        assert run(code, tmp_path).splitlines()[-1] == f"{wanted} False", arguments


def test_kernels_is_not_a_package_of_its_own() -> None:
    # Transformers looks for a package of that name: a folder with `__init__.py` would answer.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = PACKAGE / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")


def test_transformers_is_not_fooled_by_the_kernels_folder(tmp_path: Path) -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run(code, ROOT) == run(code, tmp_path)


def test_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


NATIVE = PACKAGE / "_C.abi3.so"


@pytest.mark.skipif(not NATIVE.exists(), reason="the native library is not built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
class TestNativeLibrary:
    def test_a_broken_library_is_not_passed_over(self, tmp_path: Path) -> None:
        shutil.copytree(
            PACKAGE, tmp_path / "realera_fast", ignore=shutil.ignore_patterns("*.safe*")
        )
        (tmp_path / "realera_fast" / NATIVE.name).write_bytes(b"not a library")
        code = "import sys; sys.path.insert(0, '.'); from realera_fast import ops"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode != 0 and NATIVE.name in result.stderr

    def test_without_the_library_the_reference_serves(self, tmp_path: Path) -> None:
        assert ops.implementations()["solve_spd"]["cpu"] == "native"
        ignore = shutil.ignore_patterns(NATIVE.name, "*.safetensors")
        shutil.copytree(PACKAGE, tmp_path / "realera_fast", ignore=ignore)
        code = (
            "import sys; sys.path.insert(0, '.'); from realera_fast import ops; import torch\n"
            "eye = torch.eye(3, dtype=torch.float64); ops.solve_spd(eye, eye)\n"
            "print(ops.implementations()['solve_spd']['cpu'], ops.__file__)"
        )
        assert (
            run(code, tmp_path) == f"reference {tmp_path / 'realera_fast' / 'ops' / '__init__.py'}"
        )


def edits_sys_path(node: ast.AST) -> bool:
    """Whether a statement or call changes where modules are looked for."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        place = ast.unparse(node.func.value)
        return place == "sys.path" or node.func.attr == "syspath_prepend"
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
        targets = [node.target] if hasattr(node, "target") else node.targets
        return any("sys.path" in ast.unparse(target) for target in targets)
    return False


IMPORT_OF_A_TEST = re.compile(
    r"^\s*(?:from|import) (?:test_\w+|conftest)\b|^test_\w+:\w+$", re.MULTILINE
)
"""As a statement, or as `module:function`, which the command line imports."""
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.name)
def test_tests_share_support_and_never_each_other(path: Path) -> None:
    """What two test files need lives in tests/support; pytest alone says where that is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {name.split(".")[0] for name in imported(tree)}
    assert not {name for name in names if name.startswith("test_") or name == "conftest"}
    for node in ast.walk(tree):
        assert not edits_sys_path(node), f"line {node.lineno}: set pythonpath in pyproject.toml"
        # A string may be the code of another process, whose imports are held to the same.
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.search(
                r"^\s*(?:from|import) (?:test_\w+|conftest)\b", node.value, re.MULTILINE
            )
            assert found is None, f"line {node.lineno}: {node.value[:80]}"


def test_torch_is_not_older_than_the_library_asks() -> None:
    assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def test_the_environment_is_made_anew_when_native_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None and spec.loader is not None
    setup_env = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_env)
    for name in ("requirements.txt", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    before = setup_env.fingerprint(Path("python"))
    (kernel,) = (tmp_path / "csrc" / "cuda").glob("solve_spd.cu")
    kernel.write_text(kernel.read_text() + "// changed")
    assert setup_env.fingerprint(Path("python")) != before
