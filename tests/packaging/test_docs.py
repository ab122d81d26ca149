"""README and docs: their blocks run as a reader would paste them, and the site builds strictly."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hub_server import hub_server
from huggingface_hub import constants
from ldm_checkpoint import to_ldm
from run import main as bench_run
from safetensors.torch import save_file
from tiny_clip import tiny_clip
from tiny_models import tiny_pipeline

import realera_fast
from realera_fast import EraseConfig, embedded

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_README = 150
LONGEST_MEASURED = 80
"""Lines."""

KINDS = ("object", "style", "person", "explicit")

BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, code) of every block of a page in that language."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start()].count("\n") + 2, match[2])
        for match in BLOCK.finditer(text)
        if match[1] == language
    ]


def with_blocks(language: str) -> list[Any]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if blocks(page, language)
    ]


SHORTEST = {
    "steps": 2,
    "batch_size": 2,
    "trajectories": 2,
    "sampling_steps": 2,
    "check_seeds": 1,
    "check_sampling_steps": 2,
    "check_words": 2,
}
"""What a second stage takes at most, where a page asks for more."""


def small(config: EraseConfig | None) -> EraseConfig:
    """Those settings with few prompts and a short second stage."""
    config = config or EraseConfig()
    few = {kind: ("{}", "a photo of a {}") for kind in KINDS}
    least = {name: min(value, getattr(config.alignment, name)) for name, value in SHORTEST.items()}
    return replace(
        config,
        pairs=replace(config.pairs, templates=few, neutral_words=4),
        alignment=replace(config.alignment, **least),
    )


def replace_everywhere(
    monkeypatch: pytest.MonkeyPatch, wrapped: Callable[..., Any], stand_in: Callable[..., Any]
) -> None:
    """Wherever a module of the library holds `wrapped`, under any name, it holds the stand-in."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "realera_fast":
            for attribute, value in list(vars(module).items()):
                if value is wrapped:
                    monkeypatch.setattr(module, attribute, stand_in)


@functools.cache
def _embedded_parts() -> Any:
    return embedded.load_pipeline()


@pytest.fixture
def embedded_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is read once; each page has a U-Net of its own."""
    original = _embedded_parts()

    def load_pipeline(*_: Any, **__: Any) -> Any:
        pipe = type(original)(**original.components, requires_safety_checker=False)
        pipe.unet = copy.deepcopy(original.unet)
        return pipe

    monkeypatch.setattr(embedded, "load_pipeline", load_pipeline)


@pytest.fixture
def short_erase(monkeypatch: pytest.MonkeyPatch) -> None:
    """`erase` sees few prompts and trains for two steps."""
    original = realera_fast.erase

    @functools.wraps(original)
    def erase(*arguments: Any, config: EraseConfig | None = None, **options: Any) -> Any:
        return original(*arguments, config=small(config), **options)

    replace_everywhere(monkeypatch, original, erase)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with `out` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def own_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever goes to the Hugging Face Hub goes to a server of this process."""
    with hub_server() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants._HF_DEFAULT_ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + path)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        yield


def save_clip(path: Path) -> None:
    model, processor = tiny_clip()
    model.save_pretrained(path)
    processor.save_pretrained(path)


def test_pages_have_blocks() -> None:
    """An empty README or a page that lost its blocks is no page whose blocks run."""
    assert len(blocks(README, "python")) >= 2 and len(blocks(README, "sh")) >= 2
    running = {page.name for page in PAGES if blocks(page, "python")}
    expected = {"start", "concepts", "models", "formats", "stacking", "verify", "alignment"}
    assert {f"{name}.md" for name in expected | {"kernels"}} <= running


@pytest.mark.parametrize("page", with_blocks("python"))
@pytest.mark.usefixtures("embedded_pipeline", "short_erase")
def test_python_blocks_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In order and in one namespace. A checkpoint of gigabytes is stood in for by a tiny one."""
    import diffusers

    if "push_to_hub" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("own_hub")

    for name in ("DiffusionPipeline", "StableDiffusionPipeline"):
        monkeypatch.setattr(
            getattr(diffusers, name), "from_pretrained", lambda *_, **__: tiny_pipeline()
        )
    # A machine of the reader has a GPU; this one may not.
    monkeypatch.setattr("diffusers.DiffusionPipeline.to", lambda self, *_, **__: self)
    if "clip-vit-large-patch14" in page.read_text(encoding="utf-8"):
        save_clip(folder / "clip-vit-large-patch14")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        # The line number is the page's own, so that a traceback points into it.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.usefixtures("embedded_pipeline", "short_erase")
def test_the_notebook_runs(folder: Path) -> None:
    """Its cells in order and in one namespace; what is committed with them has no error in it."""
    path = ROOT / "docs" / "first_erasure.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [1, 2, 3, 4, 5]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"execute_result", "stream"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 60_000
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code, start=1):
        source = "".join(cell["source"]).replace("steps=10", "steps=1")
        exec(compile(source, f"{path.name}, cell {number}", "exec"), namespace)
    assert (folder / "no-rabbit.safetensors").is_file()
    assert [row.group for row in namespace["found"].rows] == ["erased", "untouched", "untouched"]


# Shell


def commands_of(page: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of every command in the shell blocks of a page."""
    for line, code in blocks(page, "sh"):
        for command in code.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield line, words[:end]
                words = words[end + 1 :]


ON_A_GPU = {"--device", "--dtype"}
"""Options that a machine without a GPU does not take, with one value each."""


def prepare(folder: Path) -> None:
    """Everything that commands of the docs name and that earlier commands did not make."""
    tiny = tiny_pipeline()
    config = small(EraseConfig())
    config = replace(config, alignment=replace(config.alignment, enabled=False))
    first = realera_fast.erase(tiny, ["cat"], config=config)
    for name in ("no-cat", "no-dog", "no-rabbit", "no-van-gogh"):
        first.save(folder / f"out/{name}/erasure.safetensors")
        first.save_lora(folder / f"out/{name}/lora")
    first.save(folder / "brands.safetensors")
    realera_fast.erase(tiny, ["horse"], config=config).save(folder / "faces.safetensors")
    (folder / "brands.csv").write_text("target\ncat\n")
    (folder / "settings.json").write_text('{"seed": 1}')
    save_file(to_ldm(tiny_pipeline().unet), folder / "xl.safetensors")
    save_clip(folder / "clip")


@pytest.fixture
def tiny_command_line(
    folder: Path, short_erase: None, own_hub: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], int]:
    """The command line, for which every model is a tiny one that takes text as it comes."""
    from realera_fast.cli import program as cli

    monkeypatch.setattr("realera_fast.models.check_model", lambda *_: None)
    monkeypatch.setattr("realera_fast.cli.loading.load_pipeline", lambda *_, **__: tiny_pipeline())
    prepare(folder)
    detectors = ModuleType("mypackage.nudity")
    detectors.__dict__["detect"] = lambda image: []
    monkeypatch.setitem(sys.modules, detectors.__name__, detectors)

    def run(arguments: list[str]) -> int:
        words = iter(arguments)
        kept = [word for word in words if word not in ON_A_GPU or not next(words)]
        command = kept[0]
        if command not in ("info", "push"):
            kept += ["--quiet", *(["--force"] if command != "demo" else [])]
        if command == "verify":
            kept += ["--steps", "2", "--height", "64", "--width", "64", "--seeds", "0"]
        # The demo has a test of its own, and takes minutes: its arguments are read here.
        return cli.run(kept if command != "demo" else [*kept, "--help"])

    return run


def test_shell_commands_run(
    tiny_command_line: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `realera-fast ...` in README and docs, in order, on a tiny model."""
    seen = set()
    for page in PAGES:
        for line, words in commands_of(page):
            if words[:1] == ["realera-fast"]:
                code = tiny_command_line(words[1:])
                assert code == 0, (str(page), line, words, capsys.readouterr().err)
                seen.add(words[1])
    assert seen == {"erase", "apply", "verify", "info", "push", "demo"}


class _Parsed(Exception):
    """A case has read its command line."""


@pytest.fixture
def read_case(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Reads a command line of bench/run.py with the parser of its case, and runs nothing."""
    parse_args = argparse.ArgumentParser.parse_args
    parsers: list[argparse.ArgumentParser] = []

    def parse(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
        found = parse_args(parser, *arguments, **options)
        parsers.append(parser)
        # The first is bench/run.py's own, which leaves the rest to the case.
        if len(parsers) == 2:
            raise _Parsed
        return found

    def read(words: list[str]) -> None:
        parsers.clear()
        with pytest.raises(_Parsed):
            bench_run(words)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    return read


def inline_cases(page: Path) -> Iterator[list[str]]:
    """Commands of bench/run.py inside sentences, but those of which only `CASE` is said."""
    sentences = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
    for command in re.findall(r"`python bench/run\.py ([a-z][^`]*)`", sentences):
        yield shlex.split(command)


def test_other_shell_commands_exist(read_case: Callable[[list[str]], None]) -> None:
    """Targets of make, and cases with their options; to run them takes minutes to hours."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named, cases = set(), []
    for page in PAGES:
        cases += inline_cases(page)
        for line, words in commands_of(page):
            where = (str(page), line, words)
            named.add(words[0])
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), where
            elif words[0] == "python" and words[1] != "-m":
                assert words[1] == "bench/run.py", where
                cases.append(words[2:])
            else:
                assert words[0] in {"realera-fast", "pip", "python", ".", "bench/gpu.sh"}, where
    assert {"make", "python", "realera-fast"} <= named
    targets = {words[1] for _, words in commands_of(README) if words[0] == "make"}
    assert targets == {"demo", "test"}
    assert {"closed_form", "quality", "protocol", "publish", "embedded"} <= {c[0] for c in cases}
    for words in cases:
        read_case(words)


def test_an_option_of_another_case_is_refused(read_case: Callable[[list[str]], None]) -> None:
    read_case(["closed_form", "--quick"])
    with pytest.raises(SystemExit):
        read_case(["quality", "objects", "--quick"])


def test_the_visit_to_a_gpu_names_what_exists(read_case: Callable[[list[str]], None]) -> None:
    """bench/gpu.sh runs on a machine that is rare: what it names is there."""
    listed = subprocess.run(
        ["sh", ROOT / "bench" / "gpu.sh", "--dry-run"], capture_output=True, text=True, check=True
    ).stdout
    paths = re.findall(r"(?<![\w$/{-])(?:tests|bench|setup\.py)(?:/[\w./-]+)?", listed)
    assert {"setup.py", "tests", "tests/aot", "bench/run.py", "tests/ops/test_ops.py"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
    cases = re.findall(r"python3 bench/run\.py (.*)$", listed, re.MULTILINE)
    assert len(cases) >= 13
    for case in cases:
        read_case(shlex.split(case))


# Pages


def test_readme_fits() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def test_links_of_the_repository_point_at_files() -> None:
    """The site checks the links of its own pages; these are read on a forge."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
        assert links, name
        for link in links:
            if not re.match(r"[a-z]+:", link):
                assert (ROOT / link).exists(), (name, link)


CITING = {".py", ".md", ".sh", ".h", ".cpp", ".cu", ".cuh", ".toml", ".yml", ".yaml"}
SECTION = re.compile(r"(docs/[\w/.-]+\.md),\s+section\s+(\d+(?:\.\d+)*)")
SUFFIX = r"\.(?:py|md|sh|h|cpp|cuh?|toml|ya?ml|png|jsonl?|safetensors|txt)\b"
PATH = re.compile(
    r"(?<![\w./-])(?:realera_fast|bench|tests|csrc|kernels|docs|tools)/[\w./-]*" + SUFFIX
)
FILE = re.compile(r"(?<![\w./{}*-])\w[\w-]*\.(?:py|cpp|cuh?|sh)\b(?![/.\w(])")
"""A file of ours that is named without its folder."""
CITED_ELSEWHERE = {
    "utils.py": "a rule of CONTRIBUTING.md: there is none",
    "no_house.py": "the program of the reader of docs/alignment.md",
    "faults.cpp": "tests/ops/test_native_library.py writes it",
    "wrapper.cpp": "tests/ops/test_perturb_native.py writes it",
}
"""Files that are named and not ours, and why."""


def citing() -> list[Path]:
    """Every text of the project; what git ignores, such as out/, is not looked at."""
    folders = ("realera_fast", "kernels", "csrc", "bench", "tests", "tools", "docs")
    inside = (path for folder in folders for path in sorted((ROOT / folder).rglob("*")))
    every = (*sorted(ROOT.glob("*")), *inside)
    return [p for p in every if (p.suffix in CITING or p.name == "Makefile") and p.is_file()]


def test_cited_pages_and_sections_exist() -> None:
    """A document is cited by its path in the repository, an equation by the section."""
    ours = {path.name for path in citing()}
    sections = paths = files = 0
    for path in citing():
        text = path.read_text(encoding="utf-8")
        for cited in PATH.findall(text):
            assert (ROOT / cited).is_file(), (str(path), cited)
            paths += 1
        for cited in FILE.findall(text):
            assert cited in ours or cited in CITED_ELSEWHERE, (str(path), cited)
            files += 1
        # A citation may be broken over two lines of a comment.
        for document, section in SECTION.findall(re.sub(r"\n\s*(#|//)?\s*", " ", text)):
            headings = re.findall(r"^#+ (\d+(?:\.\d+)*)", (ROOT / document).read_text(), re.M)
            assert section in headings, (str(path), document, section)
            sections += 1
    assert sections >= 8 and paths >= 100 and files >= 50, (sections, paths, files)


def test_the_page_of_measured_facts_is_one_page() -> None:
    measured = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert len(measured.splitlines()) <= LONGEST_MEASURED


def test_page_of_the_command_line_is_what_the_commands_say() -> None:
    spec = importlib.util.spec_from_file_location("cli_page", ROOT / "tools" / "cli_page.py")
    assert spec is not None and spec.loader is not None
    cli_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli_page)
    committed = cli_page.PAGE.read_text(encoding="utf-8")
    assert committed == cli_page.page(), "run python tools/cli_page.py"


def test_site_builds_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every link, anchor, page and documented name of the site is there."""
    for package in ("mkdocs", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed: pip install -e ".[docs]"')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    assert config.strict
    build(config)
    made = {path.relative_to(tmp_path / "site").as_posix() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "changelog/index.html", "reference/config/index.html"} <= made
    assert "negative_guidance" in (tmp_path / "site/reference/config/index.html").read_text()
