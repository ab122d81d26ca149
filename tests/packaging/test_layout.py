"""The shape of the package: rooms in one line, what an import costs, what is public and built."""

from __future__ import annotations

import ast
import importlib.util
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import realera_fast
from realera_fast import ops
from realera_fast.cli import options
from realera_fast.mining.config import MODES
from realera_fast.models import DTYPES
from realera_fast.text import KINDS

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
    "transformer",
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
    "evaluation": {"PIL"},
    "embedded/judge.py": {"numpy", "PIL"},
    "cli": {"typer", "PIL"},
}
"""As CONTRIBUTING.md says: two rooms, and of a third one module."""

LONG_FILES = {
    "csrc/tiles.cpp": "compiled once for each instruction set, all in one anonymous namespace",
    "kernels/project.py": "one op: its plan, its kernels and its gradient share their shapes",
    "realera_fast/text/encoders.py": "one class: what a text encoder and its tokenizer answer",
}
"""Files over 500 lines, and why."""
LONG_BODIES: dict[str, str] = {}
"""Functions over 80 lines without their docstring, and why."""

_COMMAND = "a command of the command line: a parameter is an option"
_SCHEMA = "the schema of the op: the dispatcher passes tensors and numbers, no objects"
_TRITON = "a kernel: Triton passes pointers, strides and constants, no objects"
_PUBLIC = "public, all keyword-only with defaults but for the first few: users name what they set"
MANY_PARAMETERS = {
    **{f"realera_fast/cli/{name}.py:{name}": _COMMAND for name in ("apply", "demo", "erase")},
    "realera_fast/cli/verify.py:verify": _COMMAND,
    **{
        f"realera_fast/ops/{place}": _SCHEMA
        for place in (
            *("perturbation.py:perturb_project", "perturbation.py:perturb_accumulate_"),
            *("reference.py:perturb_project", "reference.py:perturb_accumulate_"),
            *("blockwise.py:perturb_project", "blockwise.py:perturb_accumulate_"),
            *("reference.py:perturb_project_backward", "blockwise.py:perturb_project_backward"),
        )
    },
    "kernels/gram.py:_products": _TRITON,
    **{f"kernels/perturb.py:{name}": _TRITON for name in ("_sums", "_scalars", "_rows")},
    **{f"kernels/project.py:{name}": _TRITON for name in ("_project", "_add", "_backward")},
    "realera_fast/dry_run.py:preview": _PUBLIC,
    "realera_fast/eraser.py:erase": _PUBLIC,
    "realera_fast/evaluation/html.py:write_html": _PUBLIC,
    "realera_fast/evaluation/verification.py:verify": _PUBLIC,
    "realera_fast/text/encoders.py:TextModel.__init__": _PUBLIC,
}
"""Functions of more than 8 parameters, and why."""


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
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            names |= imported(ast.Module(node.orelse, []))
        else:
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


@pytest.mark.parametrize("room", ["runtime", "text", "models"])
def test_a_face_waits_with_torch(room: str, tmp_path: Path) -> None:
    """What its `else` offers on demand is what its `if TYPE_CHECKING` imports."""
    face = f"realera_fast.{room}"
    code = f"import sys, {face}; print('torch' in sys.modules)"
    assert run(code, tmp_path) == "False"
    tree = tree_of(PACKAGE / room / "__init__.py")
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    typed: dict[str, set[str]] = {}
    for statement in checked.body:
        assert isinstance(statement, ast.ImportFrom) and statement.module
        for name in (alias.name for alias in statement.names):
            home = name if statement.module == face else statement.module.removeprefix(f"{face}.")
            typed.setdefault(home, set()).add(name)
    (assigned,) = checked.orelse
    assert isinstance(assigned, ast.Assign) and isinstance(assigned.value, ast.Call)
    offered = ast.literal_eval(assigned.value.args[1])
    assert {home: set(names) for home, names in offered.items()} == typed


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


def heavy_at_import(path: Path) -> set[str]:
    return {target.split(".")[0] for target in at_import(tree_of(path))} & set(HEAVY)


def in_place(path: Path, place: str) -> bool:
    """Whether a module is that one, or inside of that room."""
    inside = path.relative_to(PACKAGE)
    return inside == Path(place) or Path(place) in inside.parents


def lazy_exceptions(path: Path) -> set[str]:
    return set().union(*(some for place, some in LAZY_EXCEPT.items() if in_place(path, place)))


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_heavy_libraries_are_imported_lazily(path: Path) -> None:
    assert heavy_at_import(path) <= lazy_exceptions(path)


def test_exceptions_from_lazy_imports_are_used_and_told() -> None:
    rules = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for place, libraries in LAZY_EXCEPT.items():
        inside = [path for path in EVERY if in_place(path, place)]
        assert libraries == set().union(*(heavy_at_import(path) for path in inside)), place
        assert f"`{place}`" in rules.partition("3. **Lean.**")[2].partition(". `ops/")[0]


def test_nothing_imports_peft() -> None:
    users = [path for path in EVERY for n in imported(tree_of(path)) if n.startswith("peft")]
    assert not users, "adapters are written in its format, factors are trained without it"


def test_kernels_stand_below_the_operations() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        ours = {n for n in imported(tree_of(path)) if n.startswith("realera_fast")}
        # They may name what they must agree with bit for bit, and nothing above it.
        allowed = ("", ".ops", ".ops.philox", ".ops.perturb_reference", ".kernels.rounding")
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


def parameters(function: ast.FunctionDef) -> int:
    """How many a caller may pass; `*args` and `**kwargs` count as one each."""
    taken = function.args
    named = [a.arg for a in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
    own = named[:1] in (["self"], ["cls"])
    return len(named) - own + (taken.vararg is not None) + (taken.kwarg is not None)


def sources() -> list[Path]:
    """All that the project is written in, but for its tests."""
    python = (p for f in ("kernels", "bench", "tools") for p in sorted((ROOT / f).rglob("*.py")))
    native = (p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file())
    return [*EVERY, *python, *native]


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_sizes(path: Path) -> None:
    """At most 500 lines a file, 80 a function's body, and 8 parameters, or a reason above.

    Tests are left out: a test file is as long as the list of what it holds, one fact a function,
    and no reader needs the one above to read the next.
    """
    name = name_of(path)
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert (lines > 500) == (name in LONG_FILES), f"{name}: {lines} lines"
    for function, node in bodies(tree_of(path)) if path.suffix == ".py" else ():
        where = f"{name}:{function}"
        assert (body_lines(node) > 80) == (where in LONG_BODIES), f"{where}: {body_lines(node)}"
        assert (parameters(node) > 8) == (where in MANY_PARAMETERS), f"{where}: {parameters(node)}"


def test_exceptions_of_size_exist() -> None:
    known = {name_of(path) for path in sources()}
    assert set(LONG_FILES) <= known
    functions = {
        f"{name_of(p)}:{f}" for p in sources() if p.suffix == ".py" for f, _ in bodies(tree_of(p))
    }
    assert {*LONG_BODIES, *MANY_PARAMETERS} <= functions


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


WRONG = {
    "erase embedded -o x": "expected --concept, or --concepts with a file",
    "erase embedded -c cat -o x --device gpu": "no such device: 'gpu'",
    "erase embedded -c cat -o x --dtype int8": "expected one of fp32, bf16, fp16, got 'int8'",
    "erase embedded -c cat -o x --kind brand": "expected one of object, style, person, explicit",
    "erase embedded -c cat -o x --save all": "expected a list of pipeline, delta",
    "erase embedded -c cat -o x --target lora": "expected weights or adapter, got 'lora'",
    "erase embedded -c cat -o x --target adapter": "edits no weights, so there is no pipeline to",
    "erase embedded -c cat -o x --mining all": "MiningConfig.mode must be one of",
    "erase embedded -c cat -o x --config nofile.json": "nofile.json: No such file or directory",
    "demo --config nofile.json": "nofile.json: No such file or directory",
    "erase embedded -c = -o x": "Concept.target is empty: name what is to be erased",
    "erase embedded -c cat -o x --preserve cat": "'cat' is also to be erased",
    "verify embedded delta -o x --seeds one": "expected numbers such as 0,1,2, got 'one'",
    "apply": "Missing argument",
    "nothing": "No such command",
}
"""Usage that is wrong (exit code 2), and a part of what is said."""
ABSENT = {
    "info /nonexistent": "No such file or directory: /nonexistent",
    "erase embedded --concepts nofile.csv -o x": "No such file or directory: nofile.csv",
    "erase embedded -c cat -o .": "is not empty; choose another folder or pass --force",
    "erase nosuchfolder -c cat -o x": "nosuchfolder: no such folder",
    "erase no-such/model -c cat -o x": "is neither a folder nor in the Hugging Face cache",
    "erase file -c cat -o x": "expected a .safetensors file; a pickle can run anything",
    "verify embedded nope -o x": "No such file or directory: nope",
    "verify nosuchfolder file -o x": "nosuchfolder: no such folder",
    "verify nosuchfolder nope -o x": "No such file or directory: nope",
    "apply nosuchfolder file -o x": "nosuchfolder: no such folder",
    "apply nosuchfolder nope -o x": "No such file or directory: nope",
}
"""Files and folders that are not there (exit code 1), and a part of what is said."""
MOST_SECONDS = 0.5
"""Of CPU time, for help and for every error above."""


@pytest.mark.parametrize("arguments", ["--help", "erase --help", *WRONG, *ABSENT])
def test_the_command_line_starts_without_torch(arguments: str, tmp_path: Path) -> None:
    """Help and wrong usage answer before anything heavy is imported."""
    (tmp_path / "file").touch()
    code = (
        "import sys; from realera_fast import cli\n"
        f"code = cli.program.run({arguments.split()!r})\n"
        "print(code, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    wanted = 2 if arguments in WRONG else 1 if arguments in ABSENT else 0
    assert result.stdout.splitlines()[-1:] == [f"{wanted} False"], result.stderr
    assert (WRONG | ABSENT).get(arguments, "") in " ".join(result.stderr.split())


@pytest.mark.parametrize("arguments", ["--help", "erase embedded -c = -o x", "info /nonexistent"])
def test_the_command_line_answers_at_once(arguments: str, tmp_path: Path) -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    command = [sys.executable, "-m", "realera_fast", *arguments.split()]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert spent() - before < MOST_SECONDS


def test_the_command_line_knows_the_names_of_the_library() -> None:
    """They are written there a second time, so that a mistake costs no import."""
    assert options.KIND_NAMES == KINDS
    assert options.MINING_MODES == MODES
    assert options.DTYPE_NAMES == tuple(DTYPES)


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
            found = IMPORT_OF_A_TEST.search(node.value)
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


def test_what_the_order_of_the_suite_names_is_there() -> None:
    """A file or test that was renamed would be slow, or first, no more."""
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    named = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("SLOW", "LONGEST")
    }
    assert len(named) == 2 and all(named.values())
    for pattern in (*named["SLOW"], *named["LONGEST"]):
        path, *parts = pattern.split("::")
        files = list(ROOT.glob(path.split("[")[0]))
        assert files, pattern
        for part in parts:
            name = re.split(r"[\[*]", part)[0]
            assert any(re.search(rf"(def|class) {name}", file.read_text()) for file in files), name


def test_extras_that_are_set_up_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None and spec.loader is not None
    setup_env = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_env)
    assert set(setup_env.EXTRAS) == {"eval", "wheel", "image"}
    for name, packages in setup_env.EXTRAS.items():
        assert list(packages) == extras["optional-dependencies"][name]
