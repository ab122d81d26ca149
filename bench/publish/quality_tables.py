"""Tables of quality: every method on the same erasures."""

from __future__ import annotations

import statistics

from harness.rows import committed_object
from harness.tables import DEFAULT, UNERASED, percent, table

from publish.quality_rows import HEADER, SCORES, Found, bold, median_seconds, near, score


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


def model_lines() -> list[str]:
    """How well the judge recognizes the model before anything is erased."""
    found = committed_object("embedded_model.json")
    if found is None:
        return []
    held_out, sampling = found["judge_held_out"], found["sampling"]
    measures = {
        "judge on held-out renderings, things": held_out["renderings"]["things"],
        "judge on held-out renderings, styles": held_out["renderings"]["styles"],
        f"pictures of things ({found['things']['pictures']})": found["things"]["accuracy"],
        f"pictures of synonyms ({found['synonyms']['pictures']})": found["synonyms"]["accuracy"],
        f"pictures in styles ({found['styles']['pictures']})": found["styles"]["accuracy"],
    }
    body = [[name, f"{100 * value:.1f}"] for name, value in measures.items()]
    return [
        f"The embedded model before anything is erased, {sampling['steps']} {sampling['sampler']} "
        f"steps, guidance {sampling['guidance_scale']}, recognized by its judge, percent:",
        "",
        *table(("measure", "accuracy"), body),
        "",
    ]


def summary_lines() -> list[str]:
    """Mean H_o of everything that all methods did."""
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
        f"{first['dtype']}, {first['device']}, torch {first['torch']}.",
        "",
        *table(header, body),
        "",
    ]
