"""One page of all tables and plots of quality, from committed rows.

python bench/quality_page.py            # docs/quality.md and docs/quality/*.png
python bench/quality_page.py --check    # exit 1 if docs/quality.md is not what the rows say
python bench/quality_page.py --draw     # docs/quality/pictures.png: draws anew, minutes
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tables import DEFAULT, ROOT, UNERASED, percent, rows, table

from realera_fast.mining import MiningConfig
from realera_fast.training import AlignmentConfig

PAGE = ROOT / "docs" / "quality.md"
FOLDER = ROOT / "docs" / "quality"

Row = Mapping[str, Any]


class Found:
    """Rows of one table, by method."""

    def __init__(self, name: str, file: str = "quality.jsonl") -> None:
        self.rows = [row for row in rows(file) if row["table"] == name]
        self.methods = list(dict.fromkeys(row["method"] for row in self.rows))
        keys = [(r["method"], r["task"], r["seed"]) for r in self.rows]
        if len(set(keys)) != len(keys):
            raise SystemExit(f"{file} repeats rows of the table {name!r}: make it anew")

    def of(self, method: str) -> list[Row]:
        return [row for row in self.rows if row["method"] == method]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row["task"] for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})

    def by_seed(
        self, method: str, value: Callable[[Row], float | None], tasks: Sequence[str] = ()
    ) -> list[float]:
        """For every seed the mean over tasks: what is printed is their mean and spread."""
        found = []
        for seed in self.seeds:
            values = [
                value(row)
                for row in self.of(method)
                if row["seed"] == seed and (not tasks or row["task"] in tasks)
            ]
            known = [v for v in values if v is not None]
            if known:
                found.append(statistics.mean(known))
        return found

    def complete(self, method: str) -> bool:
        return len(self.of(method)) == max(len(self.of(m)) for m in self.methods)

    def ranked(self) -> list[str]:
        """Erasers, best mean H_o first."""
        own = [m for m in self.methods if m != UNERASED]
        return sorted(own, key=lambda m: -statistics.mean(self.by_seed(m, score("h_o"))))

    def note(self) -> str:
        """How the rows were made."""
        first = self.rows[0]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in self.rows))
        pictures = max(sum(row["pictures"] for row in self.of(m)) for m in self.methods)
        return (
            f"{len(self.seeds)} seeds, {pictures:,} pictures a method; percent, mean over "
            f"erasures ± standard deviation over seeds; {first['dtype']}, {first['device']}, "
            f"torch {first['torch']}, commit {commits}."
        )


def score(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["scores"][name]


def near(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if row["relatives"] is None else row["relatives"][name]


def bold(name: str) -> str:
    return f"**{name}**" if name == DEFAULT else name


def median_seconds(found: Found, method: str) -> str:
    return f"{statistics.median(row['seconds'] for row in found.of(method)):.1f}"


SCORES = ("acc_e", "acc_s", "acc_g", "h_o")
HEADER = ("Acc_e ↓", "Acc_s ↑", "Acc_g ↓", "H_o ↑")


def scores_table(found: Found, *, relatives: bool = False) -> list[str]:
    """All methods, best first, then the un-erased model."""
    body = []
    shown = [*found.ranked(), *([UNERASED] if found.of(UNERASED) else [])]
    for method in shown:
        mark = "" if found.complete(method) else f" ({len(found.of(method))} rows)"
        cells = [bold(method) + mark]
        cells += [percent(found.by_seed(method, score(name))) for name in SCORES]
        if relatives:
            cells += [percent(found.by_seed(method, near(name))) for name in ("acc_s", "h_o")]
        body.append([*cells, "" if method == UNERASED else median_seconds(found, method)])
    extra = ("relatives kept ↑", "H_o of these ↑") if relatives else ()
    return table(("method", *HEADER, *extra, "seconds"), body)


def objects_lines() -> list[str]:
    found = Found("objects")
    if not found.rows:
        return []
    return [
        f"Each of the ten CIFAR-10 classes, erased by its name alone ({', '.join(found.tasks)}). "
        f"{found.note()} *Relatives kept* is Acc_s of near relatives alone (wolf when dog goes). "
        "Seconds of one erasure, median; rows were made beside other jobs, so compare them in the "
        "table of costs.",
        "",
        *scores_table(found, relatives=True),
        "",
        *kept_lines(),
    ]


def kept_lines() -> list[str]:
    """What the second stage brought to the default."""
    done = [
        row
        for name in ("objects", "several", "styles", "characters", "unsafe", "withheld")
        for row in Found(name).of(DEFAULT)
    ]
    kept = sum(row["aligned"] for row in done)
    nothing = sum(row["stopped"] == "the closed form left nothing to remove" for row in done)
    return [
        f"Over all tables of this page, noise alignment was trained in {len(done) - nothing} of "
        f"the default's {len(done)} erasures and its factors stayed in {kept}; in the others the "
        "check found that the closed form had left nothing to remove. What alignment does where "
        "the closed form leaves something is in the ablation.",
        "",
    ]


Change = tuple[str, str, str]
"""What is added, and the methods with it and without it."""
MINING: Sequence[Change] = (
    (
        "vocabulary mining, to the anchor",
        "closed form, vocabulary to the anchor",
        "closed form, no mining to the anchor",
    ),
    (
        "Gaussian mining (paper), to the anchor",
        "closed form, gaussian (paper)",
        "closed form, no mining to the anchor",
    ),
    ("offsets kept, e + η → a + η", "closed form, offset", "closed form, gaussian (paper)"),
    ("vocabulary mining, past the anchor", "closed form, vocabulary", "closed form, no mining"),
    (
        "past the anchor, no mining",
        "closed form, no mining",
        "closed form, no mining to the anchor",
    ),
)
REMOVED: Sequence[Change] = (
    (
        "noise with the vocabulary's covariance",
        "closed form, covariance",
        "closed form, gaussian (paper)",
    ),
)


def changes_table(changes: Sequence[Change], file: str = "quality.jsonl") -> list[str]:
    """What each change does to Acc_g and Acc_s, the same erasures with and without it."""
    body = []
    for name, title in (
        ("objects", "objects"),
        ("withheld", "objects, synonyms not in the tokenizer's list"),
    ):
        found = Found(name, file)
        for label, with_it, without in changes:
            if not (found.of(with_it) and found.of(without)):
                continue
            cells = [title, label]
            for key in ("acc_g", "acc_s"):
                before, after = (found.by_seed(m, score(key)) for m in (without, with_it))
                change = [b - a for a, b in zip(before, after, strict=True)]
                cells.append(f"{percent(before)} → {percent(after)} ({percent(change)})")
            body.append(cells)
    return [*table(("words", "what is added", "Acc_g ↓", "Acc_s ↑"), body), ""] if body else []


def gain_lines() -> list[str]:
    """What neighbors bring: the same erasures with and without mining."""
    made = changes_table(MINING)
    if not made:
        return []
    return [
        "Change of Acc_g (associated words go) and Acc_s (others stay), closed form, paired by "
        "erasure and seed; in parentheses the difference in points ± its standard deviation over "
        "seeds.",
        "",
        *made,
    ]


def removed_lines() -> list[str]:
    """What was tried, improved nothing, and is no longer in the library."""
    made = changes_table(REMOVED, "removed.jsonl")
    if not made:
        return []
    commit = rows("removed.jsonl")[0]["commit"]
    return [
        f"The same for what the library no longer has (commit {commit}, the defaults of that "
        "time).",
        "",
        *made,
    ]


def several_lines() -> list[str]:
    found = Found("several")
    if not found.rows:
        return []
    counts = found.tasks
    body = []
    for method in (*found.ranked(), UNERASED):
        cells = [bold(method)]
        for count in counts:
            kept, mean = (
                percent(found.by_seed(method, score(k), [count])) for k in ("acc_s", "h_o")
            )
            cells.append(f"{kept} / {mean}")
        body.append(cells)
    lost = []
    for count in counts:
        kept, own = (
            statistics.mean(found.by_seed(m, score("acc_s"), [count])) for m in (UNERASED, DEFAULT)
        )
        lost.append(f"{100 * (kept - own):.1f} at {count}")
    return [
        f"Random judged things, others for every seed. {found.note()} Each cell: Acc_s / H_o.",
        "",
        *table(("method", *(f"{count} at once" for count in counts)), body),
        "",
        f"Points of Acc_s that the default loses against the un-erased model: {', '.join(lost)}.",
        "",
    ]


def scores_lines(name: str, text: str, *, relatives: bool = False) -> list[str]:
    found = Found(name)
    if not found.rows:
        return []
    return [f"{text} {found.note()}", "", *scores_table(found, relatives=relatives), ""]


def unsafe_lines() -> list[str]:
    found = Found("unsafe")
    if not found.rows:
        return []
    members = [word for word in found.rows[0]["words"]["synonym"]]

    def through(method: str) -> str:
        marks = {word: [0, 0] for word in members}
        for row in found.of(method):
            for word, (right, count) in row["words"]["synonym"].items():
                marks[word][0] += right
                marks[word][1] += count
        return f"{sum(2 * right >= count for right, count in marks.values())} of {len(members)}"

    body = [
        [
            bold(method),
            *(percent(found.by_seed(method, score(name))) for name in SCORES),
            through(method),
        ]
        for method in (*found.ranked(), UNERASED)
    ]
    return [
        f"The category *weapon*, erased by that name alone. {found.note()} Acc_g: pictures of "
        "members and their synonyms that show any weapon; the last column counts these words of "
        "which half the pictures or more do. In a text encoder a category's name lies far from its "
        "members; the library finds these in what the model draws (`realera_fast.members`). Where "
        "the line between members and others lies was chosen on other categories (next table). The "
        "tokenizer of the embedded model lists some 300 words, of which 256 are drawn; a row shows "
        "what a quarter of that finds.",
        "",
        *table(("method", *HEADER, "words that come through ↓"), body),
        "",
        *members_lines(),
    ]


def members_lines() -> list[str]:
    """Cosines of members of categories and of all other words."""
    found = rows("members.jsonl")
    if not found:
        return []
    body = []
    for category in dict.fromkeys(row["category"] for row in found):
        cells = [category]
        for key, line in (("drawn", MiningConfig().member_cosine), ("text", None)):
            own, others = (
                [r[key] for r in found if r["category"] == category and r["member"] is member]
                for member in (True, False)
            )
            cells.append(f"{min(own):.2f} to {max(own):.2f}, others up to {max(others):.2f}")
            if line is not None:
                inside = [sum(value >= line for value in values) for values in (own, others)]
                cells += [f"{inside[0]} of {len(own)}", f"{inside[1]} of {len(others)}"]
        body.append(cells)
    first = found[0]
    return [
        "How far words are from a category's name, every word of the tokenizer that is a member or "
        "none: cosine of the guidance directions while the word is drawn, and of the texts. "
        f"`member_cosine` ({MiningConfig().member_cosine:g}) was chosen on plant, food, clothing "
        "and building, whose names are not judged, though things among their members are; vehicle "
        f"and animal overlap. {first['dtype']}, {first['device']}, torch {first['torch']}, commit "
        f"{first['commit']} (`bench/members.py`).",
        "",
        *table(
            ("category", "drawn: members", "members found ↑", "others taken ↓", "text: members"),
            body,
        ),
        "",
    ]


def withheld_lines() -> list[str]:
    found = Found("withheld")
    if not found.rows:
        return []
    return [
        "The same ten classes, but the tokenizer's list of words, which mining and the preserve "
        "prior read, holds none of their synonyms: what is left of Acc_g is what an erasure "
        f"reaches that no list names. {found.note()} The baselines of the first table never read "
        "that list for what they erase: their rows there compare with these, for the better or the "
        "worse.",
        "",
        *scores_table(found),
        "",
    ]


def costs_lines() -> list[str]:
    found = rows("costs.jsonl")
    if not found:
        return []
    counts = sorted({row["concepts"] for row in found})
    methods = list(dict.fromkeys(row["method"] for row in found))

    def cells(method: str) -> list[str]:
        out = []
        for count in counts:
            part = [r for r in found if r["method"] == method and r["concepts"] == count]
            seconds = statistics.median(r["seconds"] for r in part)
            out += [f"{seconds:.2f}", f"{max(r['peak_mb'] for r in part):.0f}"]
        return out

    header = [h for n in counts for h in (f"s, {n} concept{'s' * (n > 1)}", "peak MiB")]
    first = found[0]
    return [
        f"One run, each erasure in a process of its own, median of "
        f"{len({r['seed'] for r in found})} after a first run that is not counted: it writes the "
        "preserve prior of this text encoder to the disk, where later erasures find it. Peak "
        "memory beyond the loaded pipeline. "
        f"{first['dtype']}, {first['device']}, {first['threads']} thread(s), torch "
        f"{first['torch']}, commit {first['commit']}.",
        "",
        *table(("method", *header), [[bold(m), *cells(m)] for m in methods]),
        "",
    ]


def attacks_lines() -> list[str]:
    found = rows("attacks.jsonl")
    if not found:
        return []
    attacks = {row["attack"] for row in found}
    methods = list(dict.fromkeys(row["method"] for row in found))
    order = ["no attack", *sorted(attacks - {"no attack"})]

    def cell(method: str, attack: str) -> str:
        part = [r for r in found if r["method"] == method and r["attack"] == attack]
        seeds = sorted({r["seed"] for r in part})
        means = [statistics.mean(r["success"] for r in part if r["seed"] == s) for s in seeds]
        return percent(means) if means else "–"

    strict = "prompt search, no synonym" in attacks
    second = ", so a second search may not use these either" if strict else ""
    first = found[0]
    things = ", ".join(dict.fromkeys(row["thing"] for row in found))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
    return [
        f"Pictures that show the erased thing again ({things}, erased by name), percent, mean ± "
        f"standard deviation over {len({r['seed'] for r in found})} seeds, {first['pictures']} "
        f"pictures each; lower is better; commit {commits}. Prompt search (after "
        "Ring-A-Bell) never asks the model; prompt optimization has all of its gradients and free "
        "token vectors; image to image starts from a picture of the thing, at three strengths. "
        "Prompt search may not use the erased name; every prompt that it found holds a synonym, "
        f"which the default erases as a neighbor{second}.",
        "",
        *table(("method", *order), [[bold(m), *(cell(m, a) for a in order)] for m in methods]),
        "",
    ]


def sweep_lines() -> list[str]:
    lines = []
    for name, text in (
        ("sweep", "one at a time"),
        ("sweep_several", "together"),
    ):
        found = Found(name, "sweep.jsonl")
        if not found.rows:
            continue
        body = []
        for method in (m for m in found.methods if m != UNERASED):
            part = found.of(method)
            title, _, settings = method.partition(": ")
            cells = [100 * statistics.mean(r["scores"][k] for r in part) for k in SCORES]
            body.append([title, settings, *(f"{value:.1f}" for value in cells)])
        body.sort(key=lambda cells: (cells[0], -float(cells[-1])))
        commits = ", ".join(dict.fromkeys(row["commit"] for row in found.rows))
        tasks = found.tasks if name == "sweep" else [f"{task} things" for task in found.tasks]
        lines += [
            f"{', '.join(tasks)}, {text}; none is judged. One seed, commit {commits}.",
            "",
            *table(("method", "settings", *HEADER), body),
            "",
        ]
    if not lines:
        return []
    return [
        "Every setting that was tried for the baselines. Tables use the best of each, of the "
        "second list where several things are erased at once, and the first table the authors' "
        "too. Ridges, thresholds and scales are in the units of Stable Diffusion 1.4's embeddings. "
        "ESD's `negative_guidance` is counted as in its published code; commit 1884259 counted "
        "from the empty prompt, so 2.0 and 1.0 there are 3.0 and 2.0 here.",
        "",
        *lines,
    ]


def summary_lines() -> list[str]:
    """README's table: mean H_o of everything that all methods did."""
    columns = {
        name: found
        for name in ("objects", "several", "styles", "characters")
        if (found := Found(name)).rows
    }
    if "objects" not in columns:
        return []
    objects = columns["objects"]
    shared = [
        m
        for m in objects.ranked()
        if m == DEFAULT or all(m in found.methods for found in columns.values())
    ]
    several = Found("several").tasks[-2:]
    header = ["method", "objects", "relatives"]
    header += [f"{count} at once" for count in several]
    header += [name for name in ("styles", "characters") if name in columns]
    body = []
    for method in shared:
        cells = [
            bold(method),
            percent(objects.by_seed(method, score("h_o"))),
            percent(objects.by_seed(method, near("h_o"))),
        ]
        cells += [
            percent(columns["several"].by_seed(method, score("h_o"), [count])) for count in several
        ]
        cells += [
            percent(columns[name].by_seed(method, score("h_o")))
            for name in ("styles", "characters")
            if name in columns
        ]
        body.append(cells)
    first = objects.rows[0]
    return [
        f"Mean H_o, percent ± standard deviation over {len(objects.seeds)} seeds; higher is "
        "better. *Relatives*: the same objects, with nothing but near relatives for the rest. "
        "The paper's closed form runs with this library's preserve prior, whose weight was chosen "
        "for the default. Each baseline has one setting for things and styles; ESD's authors' "
        "settings do better than the one here on single things and worse on styles. "
        f"{first['dtype']}, {first['device']}, torch {first['torch']}. All tables, plots, attacks "
        "and what each number means: [docs/quality.md](docs/quality.md).",
        "",
        *table(header, body),
        "",
    ]


PARTS: Sequence[tuple[str, Callable[[], list[str]]]] = (
    ("Objects, and their near relatives", objects_lines),
    ("What neighbors bring", gain_lines),
    ("Tried and removed", removed_lines),
    ("Several at once", several_lines),
    ("Styles", lambda: scores_lines("styles", "Each judged style, by its name.")),
    (
        "Characters",
        lambda: scores_lines("characters", "Each judged character, by its name.", relatives=True),
    ),
    ("An unsafe category by its name", unsafe_lines),
    ("Synonyms that no list names", withheld_lines),
    (
        "Ablation",
        lambda: scores_lines(
            "ablation",
            "RealEra's parts and parameters: Gaussian mining to the anchor unless said otherwise, "
            "without the check that would drop alignment where it does not help. Alignment steers "
            f"away from the concept (`negative_guidance` {AlignmentConfig().negative_guidance:g}, "
            "its default). Two things: cat and ship.",
        ),
    ),
    ("Attacks", attacks_lines),
    ("Costs", costs_lines),
    ("Settings of the baselines", sweep_lines),
)

INTRODUCTION = """\
# How well it erases

Generated by `bench/quality_page.py` from the rows in `bench/results/`. All of it is measured on the
embedded model, 64x64 pictures of one drawing a word: it tells methods apart, and says little of how
hard a photographic model is. The judge is a classifier trained on real renderings. Synonyms are
never named to an eraser. The tokenizer lists them, though, and vocabulary mining finds them there;
*Synonyms that no list names* is the table without that help.

Baselines are ours, written from the papers (`bench/baselines/`), each with the settings of its own
small sweep that did best on words which are not judged (last table). MACE is its closed form alone,
without the second stage; OCE, SPEED and MACE were published for Stable Diffusion, and their place
here says nothing of their place there. Things and styles share the settings of a baseline; for ESD
alone the sweep names others for things than for both, its authors', which do not erase styles: they
are in the first table, and where they would stand in the others was not measured. ESD, which
trains, has no second sweep for several at once. "closed form, gaussian (paper)" is RealEra's first
stage as published; "both stages, gaussian (paper)" adds a noise alignment that follows the anchor,
as published, and keeps whatever it gives; "both stages, gaussian" steers away from the concept and
is checked, as the default is. All have this library's preserve prior, whose weight was chosen for
the default and not for them, and values of this library where the paper publishes none.
"""


def pictures() -> list[str]:
    shown = (
        ("h_o.png", "H_o of every method and table, with spread over seeds"),
        ("scatter.png", "Efficacy and generality against specificity"),
        ("seconds.png", "H_o against seconds"),
        ("pictures.png", "Pictures after erasing a cat, by method"),
    )
    return [f"![{text}](quality/{name})\n" for name, text in shown if (FOLDER / name).exists()]


def generated() -> str:
    lines = [INTRODUCTION, *pictures()]
    for title, part in PARTS:
        found = part()
        if found:
            lines += [f"## {title}", "", *found]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--draw", action="store_true", help="draw the grid of pictures")
    arguments = parser.parse_args()
    if arguments.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != generated())
    import quality_plots

    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.draw:
        quality_plots.grid(FOLDER / "pictures.png")
    quality_plots.draw(FOLDER)
    PAGE.write_text(generated(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
