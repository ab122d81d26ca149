"""Published numbers are the ones of the committed rows."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_holds_what_the_rows_say():
    report = load("report")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.with_results(readme) == readme, "run python bench/report.py"


def test_a_changed_row_would_show(tmp_path, monkeypatch):
    report = load("report")
    row = {
        "variant": "default", "erased": "cat", "kind": "object", "split": "judged", "seed": 0,
        "before": {"acc_e": 1.0, "acc_s": 0.9, "acc_g": 1.0, "h_o": 0.0},
        "after": {"acc_e": 0.25, "acc_s": 0.5, "acc_g": None, "h_o": 0.6},
        "pictures": 4, "seconds": 2.0, "device": "cpu", "threads": 1, "torch": "2",
        "commit": "abc", "dirty": False,
    }  # fmt: skip
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    second = row | {"seed": 1, "after": row["after"] | {"acc_e": 0.35, "acc_g": 0.1}}
    (tmp_path / "variants.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(second)}\n")
    text = report.generated()
    assert "| default | 30.0 ± 7.1 | 50.0 ± 0.0 | 10.0 | 60.0 ± 0.0 | 2.0 |" in text
    assert "| un-erased model | 100.0 ± 0.0 | 90.0 ± 0.0" in text


@pytest.mark.parametrize("name", ["variants", "train_embedded"])
def test_bench_scripts_say_how_to_use_them(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = load(name)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0 and "--" in capsys.readouterr().out


def test_variants_differ_from_each_other(monkeypatch):
    variants = load("variants").variants()
    configs = [config.to_dict() for config in variants.values()]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])
