"""The shape of the package: who imports whom, what an import costs, what is public and built."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import realera_fast
from realera_fast import ops

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "realera_fast"

ORDER = (
    *(
        "metrics",
        "precision",
        "progress",
        "names",
        "settings",
        "files",
        "safetensors_file",
        "processes",
        "philox",
        "perturbation",
        "reference",
        "streamed",
        "ops",
        "denoiser",
        "states",
        "attention",
        "prompt_cache",
        "concept_map",
        "prompt_map",
        "least_squares",
    ),
    *(
        "closed_form",
        "mining",
        "incremental",
        "concepts",
        "concept_file",
        "text",
        "families",
        "pairs",
        "vocabulary",
    ),
    *("lora", "text_path", "trajectories", "training"),
    *("checkpoint", "members", "alignment", "config"),
    *("gathering", "report", "adapters", "single_file", "model_card"),
    *(
        "erasure",
        "erase",
        "clip_judge",
        "verification",
        "page",
        "embedded",
        "loading",
        "demo",
        "cli",
        "__main__",
    ),
)
"""Every module; each may import only those before it. `__init__` belongs to the last ones."""

HEAVY = ("diffusers", "transformers", "peft", "accelerate", "triton", "typer", "PIL", "numpy")
"""What the package may name only inside functions, but for the modules below."""
LAZY_EXCEPT = {
    "verification": {"numpy", "PIL"},
    "page": {"numpy", "PIL"},
    "demo": {"numpy", "PIL"},
    "embedded": {"numpy", "PIL"},
    "cli": {"typer", "numpy", "PIL"},
}


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module of the package."""
    paths = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__init__.py")]
    return {
        (
            path.parent.name if path.parent != PACKAGE and path.stem == "__init__" else path.stem
        ): ast.parse(path.read_text())
        for path in paths
    }


def imported(nodes: list[ast.stmt] | ast.Module) -> set[str]:
    """Dotted names that the statements import, those of `from a import b` as "a" and "a.b"."""
    names: set[str] = set()
    for top in nodes.body if isinstance(nodes, ast.Module) else nodes:
        for node in ast.walk(top):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def at_import(tree: ast.Module) -> set[str]:
    """What is imported when the module is: functions' bodies and `if TYPE_CHECKING` left out."""
    statements = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return imported(statements)


def run(code: str, cwd: Path) -> str:
    """Runs Python code in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_module_has_its_place() -> None:
    assert set(modules()) - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_import_direction(name: str) -> None:
    for target in imported(modules()[name]):
        parts = target.split(".")
        if parts[0] != "realera_fast" or len(parts) < 2 or parts[1] not in ORDER:
            continue
        if name == parts[1] == "embedded":
            continue  # a folder: its files may import one another
        assert ORDER.index(parts[1]) < ORDER.index(name), f"{name} imports {parts[1]}"


def test_only_ops_names_the_native_code_and_the_kernels() -> None:
    for name, tree in modules().items():
        if name == "ops":
            continue
        # `streamed` is written of operations; `ops` registers what it defines.
        calls = name == "streamed"
        named = {
            n for n in imported(tree) if n.startswith(("realera_fast.kernels", "torch.library"))
        }
        assert not named, f"{name} imports {named}"
        assert calls or "torch.ops.realera_fast" not in ast.unparse(tree), name


@pytest.mark.parametrize("name", ORDER)
def test_heavy_libraries_are_imported_lazily(name: str) -> None:
    roots = {target.split(".")[0] for target in at_import(modules()[name])}
    assert not roots & set(HEAVY) - LAZY_EXCEPT.get(name, set())


def test_nothing_imports_peft() -> None:
    users = {
        name for name, tree in modules().items() for n in imported(tree) if n.startswith("peft")
    }
    assert not users, "adapters are written in its format, factors are trained without it"


def test_kernels_stand_below_the_operations() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        names = imported(ast.parse(path.read_text()))
        ours = {".".join(n.split(".")[:2]) for n in names if n.startswith("realera_fast")}
        # They may name what they must agree with bit for bit, and nothing above it.
        assert ours <= {f"realera_fast{n}" for n in ("", ".philox", ".perturbation")}, path


def test_no_environment_variables_and_no_print() -> None:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("os.environ", "os.getenv"), name
            if isinstance(node, ast.Call) and name != "cli":
                assert ast.unparse(node.func) != "print", name


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
    public = {
        name
        for name, value in vars(realera_fast).items()
        if not name.startswith("_") and not isinstance(value, type(realera_fast))
    }
    # `erase` is the function, although a module has that name as well.
    assert public | {"__version__"} == set(names)


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
        assert run(code, tmp_path) == f"reference {tmp_path / 'realera_fast' / 'ops.py'}"


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
