"""Published numbers are the ones of the committed rows."""

import importlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness.shapes import Shape
from tiles import TILE_SETS, tile_sets, using_tiles

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    """Modules of the bench folder by name."""
    return importlib.import_module


@pytest.fixture
def speed_page(bench, tmp_path, monkeypatch):
    """The page of times, of rows in an empty folder."""
    monkeypatch.setattr(bench("harness.rows"), "RESULTS", tmp_path)
    return bench("publish.speed_page")


@pytest.fixture
def quality_page(bench, tmp_path, monkeypatch):
    """The page of quality, of rows in an empty folder."""
    monkeypatch.setattr(bench("harness.rows"), "RESULTS", tmp_path)
    return bench("publish.quality_page")


@pytest.mark.parametrize("name", ["README.md", "docs/results/speed.md", "docs/results/quality.md"])
def test_pages_hold_what_the_rows_say(name, bench):
    pages = bench("publish.pages")
    text = (ROOT / name).read_text(encoding="utf-8")
    assert name != "README.md" or "<!-- headline -->" in text
    assert pages.filled(text, pages.PAGES[ROOT / name]) == text, "run python bench/run.py publish"


def test_readme_has_three_headlines_and_a_table(bench):
    readme = bench("publish.readme")
    found = readme.headline()
    assert len(found) == 3
    assert all("](docs/results/" in text and text.startswith("- **") for text in found)
    header = "| method | objects | relatives | 10 at once | 100 at once | styles | characters |"
    assert header in readme.summary()


def test_a_page_without_markers_is_refused(bench):
    with pytest.raises(SystemExit, match="expected <!-- results -->"):
        bench("publish.pages").filled("nothing", {"results": list})


def quality_row(method, seed, task="cat", near=0.5, **scores):
    values = {"acc_e": 0.0, "acc_s": 0.9, "acc_g": 0.2, "h_o": 0.8} | scores
    return {
        "table": "objects",
        "method": method,
        "task": task,
        "seed": seed,
        "scores": values,
        "relatives": values | {"acc_s": near},
        "words": {},
        "pictures": 4,
        "concepts": 1,
        "seconds": 2.0,
        "device": "cpu",
        "threads": 1,
        "torch": "2",
        "commit": "abc",
        "dtype": "float32",
        "aligned": seed == 1,
        "stopped": "all steps done",
    }


def test_a_changed_row_of_quality_would_show(bench, quality_page, tmp_path):
    found = [
        quality_row(method, seed, task, h_o=h_o + 0.1 * seed)
        for method, h_o in (("realera_fast", 0.8), ("UCE", 0.4), ("un-erased model", 0.0))
        for seed in (0, 1)
        for task in ("cat", "ship")
    ]
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    text = "\n".join(quality_page.generated())
    cells = "0.0 ± 0.0 | 90.0 ± 0.0 | 20.0 ± 0.0 | 85.0 ± 7.1 | 50.0 ± 0.0 | 85.0 ± 7.1 | 2.0 |"
    assert f"| **realera_fast** | {cells}" in text
    assert text.index("| UCE |") < text.index("| un-erased model |")
    assert "trained in 4 of the default's 4 erasures and its factors stayed in 2;" in text
    summary = bench("publish.readme").summary()
    assert any("| **realera_fast** | 85.0 ± 7.1 | 85.0 ± 7.1 |" in line for line in summary)


def test_a_table_is_won_tied_or_lost_against_the_hardest_rival_on_the_same_seeds(
    bench, quality_page, tmp_path
):
    # "ESD" has the easiest seed alone: its mean is ahead of ours, and on that seed it is behind.
    ours = {"closed form alone": (0.7, 0.8, 0.9), "strict": (0.5, 0.6, 0.7)}
    others = {"ESD": (None, None, 0.85), "OCE": (0.1, 0.2, 0.3)}

    def told(**rival):
        rows = [
            quality_row(method, seed, h_o=h_o)
            for method, values in (ours | others | rival).items()
            for seed, h_o in enumerate(values)
            if h_o is not None
        ]
        (tmp_path / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = bench("publish.quality_standing").standing_lines()
        return next(line for line in found if line.startswith("| objects |"))

    def line(cells):
        return f"| objects | {cells} | **closed form alone** | {cells} |"

    assert told() == line("ESD | 5.0 | one seed")
    assert told(UCE=(0.66, 0.76, 0.86)) == line("UCE | 4.0 ± 0.0 (3 seeds) | ahead")
    assert told(UCE=(0.78, 0.78, 0.78)) == line("UCE | 2.0 ± 10.0 (3 seeds) | tied")
    assert told(UCE=(0.8, 0.9, 1.0)) == line("UCE | -10.0 ± 0.0 (3 seeds) | **behind**")


def test_said_and_unsaid_words_have_columns_of_their_own(bench, quality_page, tmp_path):
    table = importlib.import_module("realera_fast.embedded").words()
    cat = table.thing("cat")
    words = {"synonym": {cat.said[0]: [1, 2], cat.unsaid[0]: [3, 4], cat.unsaid[1]: [1, 4]}}
    shares = bench("quality.evaluate").associated(table, words)
    assert shares == {"said": 0.5, "unsaid": 0.5}
    row = quality_row("realera_fast", 0) | {"associated": shares | {"said": None}, "scenes": 0.25}
    (tmp_path / "quality.jsonl").write_text(json.dumps(row) + "\n")
    text = "\n".join(quality_page.generated())
    head = next(line for line in text.splitlines() if "Acc_g, unsaid" in line)
    assert "Acc_g, said" not in head and "coherent" not in head
    assert "| Acc_g, unsaid ↓ | relatives kept ↑ | H_o of these ↑ | scenes ↑ | seconds |" in head
    assert "| 50.0 | 50.0 | 80.0 | 25.0 | 2.0 |" in text


def attack_row(method, thing, success, **kind):
    return {
        "method": method,
        "thing": thing,
        "seed": 0,
        "attack": "prompt optimization",
        "success": success,
        "pictures": 8,
        "commit": "abc",
    } | kind


def test_a_style_and_a_category_have_attack_tables_of_their_own(quality_page, tmp_path):
    rows = [
        attack_row("UCE", "cat", 0.75),
        attack_row("UCE", "mosaic", 0.25, kind="style"),
        attack_row("UCE", "weapon", 0.5, kind="category"),
    ]
    (tmp_path / "attacks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "\n".join(quality_page.generated())
    assert [f"| UCE | {value} |" in text for value in ("75.0", "25.0", "50.0")] == [True] * 3
    assert "a style (mosaic)" in text and "a category (weapon)" in text
    (tmp_path / "attacks.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert "a style" not in "\n".join(quality_page.generated())


def test_repeated_rows_of_quality_are_refused(quality_page, tmp_path):
    row = json.dumps(quality_row("realera_fast", 0))
    (tmp_path / "quality.jsonl").write_text(f"{row}\n{row}\n")
    with pytest.raises(SystemExit, match="repeats rows"):
        quality_page.generated()


def test_rows_take_the_place_of_those_of_other_settings(bench, tmp_path):
    evaluate, out = bench("quality.evaluate"), tmp_path / "rows.jsonl"

    def row(method, seed, settings, world=None):
        found = {"table": "objects", "method": method, "task": "cat", "seed": seed}
        return found | {"settings": settings} | ({"world": world} if world else {})

    old, other = row("a", 0, "x"), row("a", 0, "x", world="flow")
    evaluate.put(out, [old, other], stale=False)
    evaluate.put(out, [row("a", 1, "x")], stale=False)
    evaluate.put(out, [row("a", 0, "y")], stale=True)
    rows = bench("harness.rows").read(out)
    assert rows == [other, row("a", 1, "x"), row("a", 0, "y")]
    assert evaluate.settings_key({"b": 1, "a": (2, 3)}) == evaluate.settings_key(
        {"a": [2, 3], "b": 1}
    )
    noted = tmp_path / "settings.json"
    for key, settings in (("y", {"b": 1}), ("x", {}), ("y", {"b": 2})):
        evaluate.note_settings(noted, key, settings)
    assert json.loads(noted.read_text()) == {"x": {}, "y": {"b": 1}}


def test_runs_at_a_time_leave_each_others_rows(bench, tmp_path):
    evaluate, out = bench("quality.evaluate"), tmp_path / "rows.jsonl"
    first = {"table": "objects", "method": "a", "task": "cat", "seed": -1}
    evaluate.put(out, [first], stale=False)

    def run(seed):
        with evaluate.writing(tmp_path):
            evaluate.put(out, [first | {"seed": seed}], stale=True)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, range(64)))
    assert sorted(row["seed"] for row in bench("harness.rows").read(out)) == list(range(-1, 64))


def test_settings_of_rows_are_written_down(bench):
    rows = bench("harness.rows").committed("quality.jsonl")
    noted = bench("harness.rows").committed_object("settings.json")
    named = {row["settings"] for row in rows if row.get("settings")}
    assert named and named <= set(noted)
    assert all(bench("quality.evaluate").settings_key(noted[key]) == key for key in named)


def test_the_one_door_lists_every_case(bench, capsys):
    run = bench("run")
    with pytest.raises(SystemExit) as ended:
        run.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and all(name in said for name in run.CASES)


@pytest.mark.parametrize(
    "name",
    [
        *("closed_form", "perturb", "alignment", "full_size", "entry_maps", "end_to_end"),
        *("quality", "robustness", "members", "protocol", "publish", "embedded"),
    ],
)
def test_cases_say_how_to_use_them(name, bench, capsys):
    run = bench("run")
    assert name in run.CASES
    with pytest.raises(SystemExit) as ended:
        run.main([name, "--help"])
    assert ended.value.code == 0 and f"run.py {name} " in capsys.readouterr().out


def test_older_instructions_are_for_every_library_and_in_the_rows(bench, monkeypatch):
    run, started = bench("run"), []
    monkeypatch.setattr(run.os, "execv", lambda *command: started.append(dict(run.os.environ)))
    for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", *run.INSTRUCTIONS["avx2"]):
        monkeypatch.setenv(name, "")
    run.bind_threads(1, "avx2")
    assert run.INSTRUCTIONS["avx2"].items() <= started[0].items()
    run.bind_threads(1, "avx2")
    assert len(started) == 1, "it would start again for ever"
    assert bench("harness.provenance").provenance(1)["cpu"].endswith(", avx2 alone")
    if tile_sets():
        with using_tiles("baseline"):
            run.use_loops("baseline")
            with pytest.raises(RuntimeError, match="expected a tile set"):
                run.use_loops("neon2")
    assert set(run.INSTRUCTIONS) < set(TILE_SETS)


def test_a_run_that_measures_nothing_says_so(bench, tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text("old")
    point = SimpleNamespace(title="a point")

    def fails(_):
        raise AssertionError("measured")

    with pytest.raises(SystemExit, match="nothing was measured"):
        bench("harness.rows").measured([point], fails, fails, {}, out, seconds=-1)
    assert out.read_text() == "old"


@pytest.mark.parametrize("kind", ["variants", "parts", "ablation", "sweep", "baselines"])
def test_methods_differ_from_each_other(kind, bench):
    found = getattr(bench("quality.methods"), kind)()
    settings = [(name.split(":")[0].split(",")[0], m.settings) for name, m in found.items()]
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i])


def closed_form_row(candidate, milliseconds, matrices=32, **change):
    return {
        "shape": "SD 1.4",
        "concepts": 10,
        "rows": 10,
        "candidate": candidate,
        "stage": "total",
        "dtype": "float32",
        "p50_ms": milliseconds,
        "floor_ms": 4.0,
        "matrices": 32,
        "matrices_measured": matrices,
        "threads": 1,
        "device": "cpu",
        "cpu": "Xeon",
        "torch": "2",
        "commit": "abc",
        "dirty": False,
        "date": "today",
    } | change


def test_closed_form_table(speed_page, tmp_path):
    assert speed_page.generated() == []
    found = [
        closed_form_row("library", 6.0),
        closed_form_row("library", 1.0, stage="solve"),
        closed_form_row("uce", 30.0, matrices=2),
        closed_form_row("composition", 9.0),
    ]
    path = tmp_path / "closed_form.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    text = "\n".join(speed_page.generated())
    assert "| SD 1.4 | 10 | 6.0 | 1.50 | 80.0x (2 of 32) | – | – | 1.50x |" in text


@pytest.mark.parametrize("change", [{"commit": "def"}, {"date": "tomorrow"}, {}])
def test_closed_form_rows_of_two_runs_are_refused(change, speed_page, tmp_path):
    found = [closed_form_row("library", 6.0), closed_form_row("library", 5.0, **change)]
    path = tmp_path / "closed_form.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    with pytest.raises(SystemExit, match="mixes runs"):
        speed_page.generated()


def closed_form_module(monkeypatch):
    return importlib.import_module("speed.closed_form")


def target_rows(library=5.0, composition=8.0, floor=4.0, error=1e-7, residual=1.0, **change):
    own = {"error": error, "residual_ratio": residual, "floor_ms": floor} | change
    return [
        *(
            closed_form_row("library", library, stage=s, **own)
            for s in ("solve", "update", "total")
        ),
        closed_form_row("composition", composition, **{**own, "error": 1e-7}),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"library": 9.0, "floor": 9.0}, "0.89x composition"),
        ({"composition": 6.0}, "1.20x composition at 1.25x floor"),
        ({"composition": 5.2, "floor": 4.9}, None),
        ({"floor": 3.0}, "1.67x floor"),
        ({"error": 3e-7}, "error 3e-07"),
        ({"residual": 31.0}, "residual ratio"),
    ],
)
def test_targets(change, words, monkeypatch):
    missed = closed_form_module(monkeypatch).COMPARED.missed(target_rows(**change))
    assert missed == [] if words is None else len(missed) == 1 and words in missed[0]


def test_growth_target(monkeypatch):
    module = closed_form_module(monkeypatch)
    few = target_rows(concepts=1000, rows=1000)
    for factor, met in ((11, True), (12, False)):
        many = target_rows(5.0 * factor, 8.0 * factor, 4.0 * factor, concepts=10_000, rows=10_000)
        assert (module.COMPARED.missed(few + many) == []) is met


def test_floor_counts_the_cheaper_system(monkeypatch):
    module = closed_form_module(monkeypatch)
    rates = module.Rates(float32=1e12, float64=1e9, in_place=1e9, copy=1e9)
    shape = Shape("small", 100, (50, 70))
    one = module.floors(module.Point(shape, 1), rates)
    # 3 n^2 d + n^3 / 3 flops, and every weight read and written once
    assert one["solve"] == pytest.approx(1e3 * (300 + 1 / 3) / 1e9)
    assert one["update"] == pytest.approx(1e3 * 2 * 120 * 100 * 4 / 1e9)
    many = module.floors(module.Point(shape, 1000), rates)
    assert many["solve"] == pytest.approx(1e3 * (3 * 1000 * 1e4 + 1e6 / 3 + 2e6) / 1e9)
    own = module.Point(Shape("own", 100, (50, 70), own_rows=True), 1)
    assert module.floors(own, rates)["solve"] == pytest.approx(2 * one["solve"])
    assert module.floors(own, rates, 1)["solve"] == pytest.approx(one["solve"])


def test_measuring_a_small_point(monkeypatch):
    module = closed_form_module(monkeypatch)
    device = module.torch.device("cpu")
    effort = module.Effort(0.01, 60.0, 1)
    for own in (False, True):
        point = module.Point(Shape("small", 16, (16, 16, 16), own_rows=own), 3)
        rates = module.Rates(float32=1e9, float64=1e9)
        rows, notes = module.measure(point, rates, device, effort)
        assert not notes and len(rows) == 2 * 3 + 3
        assert all(row["error"] < 1e-2 and row["p20_ms"] <= row["p80_ms"] for row in rows)
        line = module.COMPARED.line(*next(iter(module.COMPARED.by_point(rows).items())))
        assert "uce" in line and "floor" in line


def test_plot(bench, tmp_path):
    pytest.importorskip("matplotlib")
    found = [
        closed_form_row(
            name, time * n, matrices, concepts=n, rows=n, p20_ms=time * n, p80_ms=time * n
        )
        for n in (1, 10)
        for name, time, matrices in (("library", 6.0, 32), ("uce", 30.0, 2))
    ]
    path = tmp_path / "closed_form.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    bench("publish.plots").closed_form(path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def perturb_row(candidate, milliseconds, operation="rows", **change):
    return {
        "operation": operation,
        "shape": "SD 1.4",
        "concepts": 1,
        "samples": 16,
        "dtype": "float32",
        "candidate": candidate,
        "p20_ms": milliseconds,
        "p50_ms": milliseconds,
        "p80_ms": milliseconds,
        "error": 0.0,
        "cpu": "x",
        "threads": 2,
        "torch": "2",
        "device": "cpu",
        "commit": "abc",
        "dirty": False,
        "date": "today",
    } | change


def perturb_case(monkeypatch):
    return importlib.import_module("speed.perturb")


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([("eager", 1.31)], []),
        ([("eager", 1.29)], ["1.29x eager"]),
        ([("eager", 2.0), ("compiled", 0.99)], ["0.99x compiled"]),
        ([("eager", 2.0), ("compiled", 1.01)], []),
    ],
)
def test_targets_of_neighbors(rows, missed, monkeypatch):
    case = perturb_case(monkeypatch)
    found = case.COMPARED.missed(
        [perturb_row("library", 1.0), *(perturb_row(*row) for row in rows)]
    )
    assert len(found) == len(missed)
    for text, part in zip(found, missed, strict=True):
        assert part in text and text.startswith("rows SD 1.4 1 x 16 float32")


def test_targets_of_rates_and_bits(monkeypatch):
    case = perturb_case(monkeypatch)
    own = perturb_row("library", 1.0, "project")
    assert case.COMPARED.missed([own, perturb_row("ceiling", 0.81, "project")]) == []
    assert (
        "79% of the bare" in case.COMPARED.missed([own, perturb_row("ceiling", 0.79, "project")])[0]
    )
    assert "same bits" in case.COMPARED.missed([perturb_row("library", 1.0, error=1e-9)])[0]


@pytest.mark.parametrize("operation", ["rows", "project", "lora", "backward", "accumulate"])
def test_candidates_of_neighbors_solve_the_same_problem(operation, monkeypatch):
    case = perturb_case(monkeypatch)
    shape = Shape("tiny", 24, (3, 8))
    point = case.Point(operation, shape, 2, 3)
    problem = case.Problem(point, torch.device("cpu"))
    ours, defined = problem.library(), problem.defined()
    assert case.greatest_error(ours, defined) < 1e-5
    # The published way draws other numbers; its results have the same shapes.
    eager = problem.eager()
    if operation in ("project", "lora"):
        assert torch.cat(eager, 1).shape == ours.flatten(0, 2).shape
    else:
        shapes = [t.shape for t in (eager if isinstance(eager, tuple) else [eager])]
        assert shapes == [t.shape for t in (ours if isinstance(ours, tuple) else [ours])]
    found = case.measure(point, torch.device("cpu"), 0.0)
    assert [row["candidate"] for row in found] == ["library", "eager", "ceiling"]
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in found)
    assert case.COMPARED.line(*next(iter(case.COMPARED.by_point(found).items()))).startswith(
        operation
    )


def test_table_of_neighbors(speed_page, tmp_path):
    rows = [perturb_row("library", 2.0), perturb_row("eager", 5.0), perturb_row("ceiling", 1.0)]
    path = tmp_path / "perturb.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert "| draw rows | SD 1.4 | 1 x 16 | 2.00 | 2.50x | – | 0.50x |" in speed_page.generated()
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, rows[0]]))
    with pytest.raises(SystemExit, match="repeats rows"):
        speed_page.generated()


def alignment_row(candidate, milliseconds, operation="step", **change):
    return {
        "operation": operation,
        "model": "embedded",
        "dtype": "float32",
        "rows": 20,
        "candidate": candidate,
        "p20_ms": milliseconds,
        "p50_ms": milliseconds,
        "p80_ms": milliseconds,
        "error": 0.0,
        "peak_bytes": None,
        "step_bytes": 5 << 20,
        "flops": 1,
        "compile_s": None,
        "matmul_flops_per_s": 1.0,
        "cpu": "x",
        "threads": 2,
        "torch": "2",
        "device": "cpu",
        "commit": "abc",
        "dirty": False,
        "date": "today",
    } | change


def alignment_case(monkeypatch):
    return importlib.import_module("speed.alignment")


@pytest.mark.parametrize(
    ("own", "plain", "missed"),
    [
        ({}, {"p50_ms": 1.51}, []),
        ({}, {"p50_ms": 1.49}, ["1.49x the plain loop, wanted 1.5"]),
        (
            {"operation": "image", "error": 1e-3},
            {"operation": "image", "p50_ms": 1.0},
            ["differs by 0.001"],
        ),
        (
            {"model": "SD 1.4", "peak_bytes": 70, "flops": 44, "matmul_flops_per_s": 1e5},
            {"model": "SD 1.4", "peak_bytes": 100, "p50_ms": 1.9},
            ["1.90x the plain loop, wanted 2.0", "44% of the matrix peak", "70% of the memory"],
        ),
        (
            {"model": "SD 1.4", "peak_bytes": 60, "flops": 46, "matmul_flops_per_s": 1e5},
            {"model": "SD 1.4", "peak_bytes": 100, "p50_ms": 2.1},
            [],
        ),
    ],
)
def test_targets_of_alignment(own, plain, missed, monkeypatch):
    case = alignment_case(monkeypatch)
    found = case.COMPARED.missed(
        [alignment_row("library", 1.0, **own), alignment_row("plain", 9.0, **plain)]
    )
    assert len(found) == len(missed)
    assert all(part in text for text, part in zip(found, missed, strict=True))


@pytest.mark.parametrize("operation", ["step", "worst step", "train", "image"])
def test_candidates_of_alignment_solve_the_same_problem(operation, monkeypatch):
    from tiny_models import tiny_unet

    case = alignment_case(monkeypatch)
    problem = importlib.import_module("speed.alignment_problem")
    monkeypatch.setattr(problem, "model_of", lambda name: tiny_unet())
    monkeypatch.setattr(problem, "STEPS", 2)
    monkeypatch.setattr(problem, "IMAGE_STEPS", 2)
    point = case.Point(operation, "tiny", torch.float32, batch_size=2)
    found = case.measure(point, torch.device("cpu"), 1, 0.0)
    names = [row["candidate"] for row in found]
    assert names[:2] == ["library", "plain"]
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in found)
    if operation != "train":
        # The loss of the same rows, a picture from the same noise.
        assert found[0]["error"] < 1e-5
    if operation == "step":
        assert found[0]["flops"] > 1e6 and found[0]["matmul_flops_per_s"] > 1e6
    assert case.COMPARED.line(*next(iter(case.COMPARED.by_point(found).items()))).startswith(
        operation
    )


def test_table_and_plot_of_alignment(bench, speed_page, tmp_path):
    rows = [
        alignment_row("library", 2.0),
        alignment_row("plain", 5.0),
        alignment_row("library compiled", 1.0),
    ]
    path = tmp_path / "alignment.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    line = "| optimizer step | embedded, float32 | 20 | 2.0 | 2.50x | – | 0.50x | – | 5 | 5 |"
    assert line in speed_page.generated()
    pytest.importorskip("matplotlib")
    bench("publish.plots").alignment(path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(("table", "chosen"), [("sweep", "TUNED"), ("sweep_several", "TOGETHER")])
def test_baselines_have_the_best_settings_of_their_sweeps(table, chosen, bench):
    methods, found = (
        bench("quality.methods"),
        bench("publish.quality_rows").Found(table, "sweep.jsonl"),
    )
    for name, settings in getattr(methods, chosen).items():
        means = {
            method: round(sum(r["scores"]["h_o"] for r in rows) / len(rows), 9)
            for method in found.methods
            if method.startswith(f"{name}: ") and (rows := found.of(method))
        }
        if name in methods.TRAINED and not means:
            assert settings == methods.BASELINES[name].Settings(), "not swept: the defaults"
            continue
        assert means[f"{name}: {methods.label(settings)}"] == max(means.values()), name


def test_more_at_once_leave_the_draws_of_the_others(bench):
    """Rows of other counts stay valid, and a column stands where its number belongs."""
    tasks = bench("quality.tasks")
    plan = tasks.Plan(importlib.import_module("realera_fast.embedded").words(), "judged")
    found = {task.name: task for task in tasks.several(plan, [3])}
    assert list(found) == ["1", "10", "50", "100"]
    for name, task in found.items():
        drawn = random.Random(100 * int(name) + 3).sample(plan.things, int(name))
        assert [concept.target for concept in task.concepts] == [thing.name for thing in drawn]
    assert {shot.group for shot in found["50"].shots[3]} == {
        *("erased", "synonym", "relative", "untouched")
    }
    rows = bench("harness.rows").committed("quality.jsonl")
    old = [row for row in rows if row["table"] == "several" and row["seed"] == 3]
    for row in (row for row in old if "world" not in row and row["task"] in found):
        asked = {shot.word for shot in found[row["task"]].shots[3] if shot.group == "erased"}
        assert set(row["words"]["erased"]) == asked


def test_fifty_at_once_have_a_column_where_there_are_rows(bench, quality_page, tmp_path):
    found = [
        quality_row(method, 0, task, acc_s=kept) | {"table": "several"}
        for method, kept in (("realera_fast", 0.5), ("un-erased model", 0.75))
        for task in ("1", "10", "100")
    ]
    found += [quality_row("realera_fast", 0, "50", acc_s=0.25) | {"table": "several"}]
    found += [quality_row("realera_fast", 0)]
    path = tmp_path / "quality.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    text = "\n".join(quality_page.generated())
    assert "| method | 1 at once | 10 at once | 50 at once | 100 at once |" in text
    assert "| **realera_fast** | 50.0 / 80.0 | 50.0 / 80.0 | 25.0 / 80.0 | 50.0 / 80.0 |" in text
    assert "25.0 at 1, 25.0 at 10, 25.0 at 100." in text
    # The summaries say the same counts as before.
    assert "| method | objects | relatives | 10 at once | 100 at once |" in text
    assert any("10 at once | 100 at once |" in line for line in bench("publish.readme").summary())
    path.write_text("".join(json.dumps(row) + "\n" for row in found if row["task"] != "50"))
    assert "50 at once" not in "\n".join(quality_page.generated())


def test_long_prompts_are_long_and_say_the_word(bench):
    tasks, table = bench("quality.tasks"), importlib.import_module("realera_fast.embedded").words()
    tokenizer = importlib.import_module("realera_fast.embedded").load_pipeline().tokenizer
    made = tasks.lengthy(tasks.Plan(table, "judged"), [0, 1])
    assert [task.name for task in made] == list(tasks.CIFAR10)
    shots = [shot for task in made for seed in (0, 1) for shot in task.shots[seed]]
    assert {shot.group for shot in shots} == {"erased", "synonym", "relative", "untouched"}
    assert all(shot.kind == "thing" and shot.word in shot.prompt for shot in shots)
    lengths = [len(tokenizer(shot.prompt).input_ids) for shot in shots]
    assert 25 <= min(lengths) and max(lengths) <= 60 and len(set(lengths)) > 10
    again = tasks.lengthy(tasks.Plan(table, "judged"), [0, 1])
    assert [task.shots for task in again] == [task.shots for task in made]
    beginnings = {shot.prompt.split(" of ")[0] for shot in shots if shot.group == "erased"}
    assert len(beginnings) >= len(tasks.LONG)


def test_long_prompts_have_a_section_where_there_are_rows(quality_page, tmp_path):
    path = tmp_path / "quality.jsonl"
    path.write_text(json.dumps(quality_row("realera_fast", 0)) + "\n")
    assert "Long prompts" not in "\n".join(quality_page.generated())
    row = quality_row("realera_fast", 0, acc_s=0.125) | {"table": "long"}
    path.write_text(json.dumps(row) + "\n")
    text = "\n".join(quality_page.generated())
    assert "## Long prompts" in text and "| **realera_fast** | 0.0 | 12.5 |" in text


def test_sweeps_say_on_how_much_each_setting_was_tried(quality_page, tmp_path):
    found = [
        quality_row(f"{name}: a", seed, task) | {"table": "sweep"}
        for name, seeds, tasks in (
            ("UCE", (0,), ("cow", "snake")),
            ("OCE", (0,), ("cow", "snake")),
            ("GEM", (0,), ("cow",)),
            ("Other", (0, 1), ("cow", "snake")),
        )
        for seed in seeds
        for task in tasks
    ]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    text = "\n".join(quality_page.generated())
    assert "Seeds 0 where a row says nothing else" in text
    assert "| UCE | a | 0.0 |" in text and "| GEM | a (on 1 of 2) | 0.0 |" in text
    assert "| Other | a (seeds 0, 1) | 0.0 |" in text


def test_ablation_switches_parts_off(bench):
    parts = bench("quality.methods").ablation()
    alone = parts["alignment, beyond"].settings
    assert alone["mining"]["mode"] == "gaussian"
    assert not alone["closed_form"]["enabled"] and alone["mining"]["neighbor_scale"] == 0
    assert alone["mining"]["beyond_scale"] > 0 and alone["alignment"]["beyond_scale"] > 0
    assert all(method.settings["alignment"]["check_seeds"] == 0 for method in parts.values())
