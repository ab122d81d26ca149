"""Tables of what parts, members, attacks, costs and settings do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from harness.rows import committed
from harness.tables import UNERASED, percent, table

from publish.quality_rows import HEADER, SCORES, Found, Row, bold, score
from realera_fast.mining import MiningConfig


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
        "members; the library finds these in what the model draws (`realera_fast.mining`). Where "
        "the line between members and others lies was chosen on other categories (next table). The "
        "words nearest to the name are drawn, 256 by default; a row shows what a quarter of that "
        "finds.",
        "",
        *table(("method", *HEADER, "words that come through ↓"), body),
        "",
        *members_lines(),
    ]


def members_lines() -> list[str]:
    """Cosines of members of categories and of all other words."""
    found = committed("members.jsonl")
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
        "How far words are from a category's name, of the words near it those that the embedded "
        "model's table knows: cosine of the guidance directions while the word is drawn, and of "
        "the texts. "
        f"`member_cosine` ({MiningConfig().member_cosine:g}) was chosen on plant, food, clothing "
        "and building, whose names are not judged, though things among their members are; vehicle "
        f"and animal overlap. {first['dtype']}, {first['device']}, torch {first['torch']}, commit "
        f"{first['commit']} (`bench/quality/members.py`).",
        "",
        *table(
            ("category", "drawn: members", "members found ↑", "others taken ↓", "text: members"),
            body,
        ),
        "",
    ]


def costs_lines() -> list[str]:
    found = committed("costs.jsonl")
    if not found:
        return []
    counts = sorted({row["concepts"] for row in found})
    methods = list(dict.fromkeys(row["method"] for row in found))

    def cells(method: str) -> list[str]:
        out = []
        for count in counts:
            part = [r for r in found if r["method"] == method and r["concepts"] == count]
            if not part:
                out += ["–", "–"]
                continue
            seconds = statistics.median(r["cpu_seconds"] for r in part)
            out += [f"{seconds:.2f}", f"{max(r['peak_mb'] for r in part):.0f}"]
        return out

    header = [h for n in counts for h in (f"CPU s, {n} concept{'s' * (n > 1)}", "peak MiB")]
    first = found[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
    return [
        f"One run, each erasure in a process of its own, median of "
        f"{len({r['seed'] for r in found})}, seconds of a CPU; the preserve prior of this text "
        "encoder lies on the disk already. Peak memory beyond the loaded pipeline. "
        f"{first['dtype']}, {first['device']}, {first['threads']} thread(s), torch "
        f"{first['torch']}, commit {commits}.",
        "",
        *table(("method", *header), [[bold(m), *cells(m)] for m in methods]),
        "",
    ]


ATTACKS = {
    "prompt search": "Prompt search (after Ring-A-Bell) never asks the model and may not use the "
    "erased name.",
    "prompt search, no synonym": "A second search may not use its synonyms either.",
    "prompt optimization": "Prompt optimization has all gradients of the edited model and free "
    "token vectors in place of the name (three vectors, 120 steps of four noised pictures).",
    "image to image": "Image to image starts from a picture of the thing, at three strengths.",
    "concept inversion": "Concept inversion learns the vector of one new token from the pictures "
    "of the thing against the edited model ({steps} steps of {batch_size} noised pictures).",
    "fine-tuning": "Fine-tuning trains the edited model's cross-attention on pictures of other "
    "things ({steps} steps of {batch_size} of them) and then asks for the name.",
    "null-text inversion": "Null-text inversion takes a picture of the thing back to noise and "
    "draws it again without text ({steps} DDIM steps, {inner_steps} AdamW steps on the empty "
    "prompt in each). A denoiser of random weights gives the pictures back as well, so nothing is "
    "claimed of that column.",
}
"""What is said of attacks, by how their names begin; budgets are those of the rows."""


KINDS = {
    "style": "The same on a style ({on}), which becomes the plain one: free vectors and the learnt "
    "token stand for its name, and the judge is asked for the style.",
    "category": "The same on a category ({on}), erased by that name alone. The name draws nothing "
    "by itself, so that a member's name is asked for and its pictures are learnt from, another's "
    "for every seed; free vectors start from the category's name, and any member counts.",
}
"""What is said of rows that are not about things; prompt searches are about things alone."""


def attacks_lines() -> list[str]:
    every = committed("attacks.jsonl")
    if not every:
        return []
    found = [row for row in every if row.get("kind", "thing") == "thing"]
    told = []
    for start, text in ATTACKS.items():
        rows = [row for row in every if row["attack"].startswith(start)]
        if rows:
            told.append(text.format(**rows[0].get("budget", {})))
    lines = []
    if found:
        commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
        lines += [
            f"Pictures that show the erased thing again, erased by name ({_spread(found)}); "
            f"percent, mean ± standard deviation over seeds, {found[0]['pictures']} pictures each; "
            f"lower is better; commit {commits}. {' '.join(told)}",
            "",
            *_attacks_table(found),
            "",
        ]
    for kind, text in KINDS.items():
        part = [row for row in every if row.get("kind") == kind]
        if part:
            on = ", ".join(dict.fromkeys(row["thing"] for row in part))
            commits = ", ".join(dict.fromkeys(row["commit"] for row in part))
            about = f"{text.format(on=on)} {_spread(part)}; commit {commits}."
            lines += [about, "", *_attacks_table(part), ""]
    return lines


def _attacks_of(found: Sequence[Row]) -> list[str]:
    return sorted({row["attack"] for row in found}, key=lambda name: (name != "no attack", name))


def _spread(found: Sequence[Row]) -> str:
    """On what and on how many seeds each attack was run."""
    spread = []
    for name in _attacks_of(found):
        part = [row for row in found if row["attack"] == name]
        seeds = len({row["seed"] for row in part})
        on = ", ".join(dict.fromkeys(row["thing"] for row in part))
        spread.append(f"{name}: {on}; {seeds} seed{'s' * (seeds > 1)}")
    return ". ".join(spread)


def _attacks_table(found: Sequence[Row]) -> list[str]:
    methods = list(dict.fromkeys(row["method"] for row in found))
    order = _attacks_of(found)

    def cell(method: str, attack: str) -> str:
        part = [r for r in found if r["method"] == method and r["attack"] == attack]
        seeds = sorted({r["seed"] for r in part})
        means = [statistics.mean(r["success"] for r in part if r["seed"] == s) for s in seeds]
        most = max(sum(r["method"] == m and r["attack"] == attack for r in found) for m in methods)
        mark = "" if len(part) == most else f" ({len(part)} of {most} rows)"
        return percent(means) + mark if means else "–"

    return table(("method", *order), [[bold(m), *(cell(m, a) for a in order)] for m in methods])


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
        every, usual = len(found.tasks), statistics.mode(map(found.seeds_of, found.methods))
        for method in (m for m in found.methods if m != UNERASED):
            part = found.of(method)
            title, _, settings = method.partition(": ")
            # What trains takes a minute each.
            tasks = len({row["task"] for row in part})
            settings += f" (on {tasks} of {every})" if tasks < every else ""
            seeds = found.seeds_of(method)
            settings += f" (seeds {', '.join(map(str, seeds))})" if seeds != usual else ""
            cells = [100 * statistics.mean(r["scores"][k] for r in part) for k in SCORES]
            body.append([title, settings, *(f"{value:.1f}" for value in cells)])
        body.sort(key=lambda cells: (cells[0], -float(cells[-1])))
        commits = ", ".join(dict.fromkeys(row["commit"] for row in found.rows))
        on = found.tasks if name == "sweep" else [f"{task} things" for task in found.tasks]
        lines += [
            f"{', '.join(on)}, {text}; none is judged. Seeds {', '.join(map(str, usual))} where a "
            f"row says nothing else, commit {commits}.",
            "",
            *table(("method", "settings", *HEADER), body),
            "",
        ]
    if not lines:
        return []
    return [
        "Every setting that was tried for the baselines. Tables use the best of each, of the "
        "second list where several things are erased at once; of what trains, but for MACE, "
        "cow and sailboat alone decide. Ridges, thresholds and scales are in the units of Stable "
        "Diffusion 1.4's embeddings.",
        "",
        *lines,
    ]
