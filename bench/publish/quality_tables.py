"""Tables of quality: every method on the same erasures."""

from __future__ import annotations

import statistics

from harness.rows import committed, committed_object
from harness.tables import DEFAULT, FIRST, STRICT, UNERASED, percent, table

from publish.quality_rows import (
    FURTHER,
    HEADER,
    QUALITY,
    SCORES,
    SUMMED,
    Found,
    bold,
    median_seconds,
    near,
    own_method,
    score,
)
from realera_fast.embedded import words
from realera_fast.embedded.flow import FLOW


def scores_table(found: Found) -> list[str]:
    """All methods, best first, then the un-erased model; further columns where rows have them."""
    columns = {title: score(name) for title, name in zip(HEADER, SCORES, strict=True)}
    columns |= {
        title: value
        for title, value in FURTHER.items()
        if any(value(row) is not None for row in found.rows)
    }
    body = []
    shown = [*found.ranked(), *([UNERASED] if found.of(UNERASED) else [])]
    for method in shown:
        mark = "" if found.complete(method) else f" ({len(found.of(method))} rows)"
        cells = [bold(method) + mark]
        cells += [percent(found.by_seed(method, value)) for value in columns.values()]
        body.append([*cells, "" if method == UNERASED else median_seconds(found, method)])
    return table(("method", *columns, "seconds"), body)


def objects_lines() -> list[str]:
    found = Found("objects")
    if not found.rows:
        return []
    return [
        f"Each of the ten CIFAR-10 classes, erased by its name alone ({', '.join(found.tasks)}). "
        f"{found.note()} *Relatives kept* is Acc_s of near relatives alone (wolf when dog goes); "
        "kinds of what goes (a taxi is a car) are counted apart, since whether these should go as "
        "well is the user's to say. "
        + (FURTHER_TEXT if any("associated" in row for row in found.rows) else "")
        + "Seconds of one erasure, median; rows were made beside other jobs, so compare them in "
        "the table of costs.",
        "",
        *scores_table(found),
        "",
        *kept_lines(),
    ]


FURTHER_TEXT = (
    "*Said* words stood in captions of the model's training, *unsaid* ones in none; *scenes*: the "
    "other thing of two is there; *coherent*: pictures of the erased name show something that has "
    "a name. "
)


def kept_lines() -> list[str]:
    """What the second stage brought to the default."""
    done = [
        row
        for name in ("objects", "several", "styles", "characters", "unsafe", "withheld", "long")
        for row in Found(name).of(DEFAULT)
    ]
    if not done:
        return []
    kept = sum(row["aligned"] for row in done)
    nothing = sum(row["stopped"] == "the closed form left nothing that shows" for row in done)
    return [
        f"Over all tables of this page, noise alignment was trained in {len(done) - nothing} of "
        f"the default's {len(done)} erasures and its factors stayed in {kept}; in the others the "
        "check found that the closed form had left nothing that shows. What alignment does where "
        "the closed form leaves something is in the ablation.",
        "",
    ]


def several_table(found: Found) -> list[str]:
    """Acc_s and H_o of every method, by how many go at once."""
    body = []
    for method in (m for m in (*found.ranked(), UNERASED) if m in found.methods):
        cells = [bold(method)]
        for count in found.counts:
            kept, mean = (
                percent(found.by_seed(method, score(k), [count])) for k in ("acc_s", "h_o")
            )
            cells.append(f"{kept} / {mean}")
        body.append(cells)
    return table(("method", *(f"{count} at once" for count in found.counts)), body)


def several_lines() -> list[str]:
    found = Found("several")
    if not found.rows:
        return []
    lines = [
        f"Random judged things, others for every seed. {found.note()} Each cell: Acc_s / H_o.",
        "",
        *several_table(found),
        "",
    ]
    library = own_method(found)
    if {UNERASED, library} <= set(found.methods):
        lost = []
        for count in found.counts:
            kept, own = (found.by_seed(m, score("acc_s"), [count]) for m in (UNERASED, library))
            if kept and own:
                points = 100 * (statistics.mean(kept) - statistics.mean(own))
                lost.append(f"{points:.1f} at {count}")
        lines += [
            f"Points of Acc_s that **{library}** loses against the un-erased model: "
            f"{', '.join(lost)}.",
            "",
        ]
    return lines


def sequential_lines() -> list[str]:
    """Erasures on top of each other, beside the same in one."""
    found = Found("sequential")
    if not found.rows:
        return []
    table_of_words = words()

    def drawn(method: str, group: str) -> str:
        """Pictures of the first of them."""
        right = every = 0
        for row in found.of(method):
            first = next(iter(row["words"]["erased"]))
            synonyms = table_of_words.held_out(table_of_words.thing(first))
            for word in [first] if group == "erased" else synonyms:
                seen, of = row["words"][group][word]
                right, every = right + seen, every + of
        return f"{right} of {every}"

    body = []
    for method in found.methods:
        mark = "" if found.complete(method) else f" ({len(found.of(method))} rows)"
        cells = [bold(method) + mark, drawn(method, "erased"), drawn(method, "synonym")]
        values = (score("acc_e"), score("acc_g"), near("acc_s"), score("acc_s"))
        of_all = method != FIRST
        cells += [percent(found.by_seed(method, v)) if of_all else "–" for v in values]
        body.append(cells)
    count = found.rows[0]["concepts"]
    return [
        f"{count} judged things, others for every seed, that all become one other: in one erasure, "
        "each on top of those before it, and each with `extends=`, which takes them off and erases "
        "all in one. On top of each other what went stays away and side effects add up "
        f"([Stacking](../stacking.md)). {found.note()}",
        "",
        *table(
            (
                "method",
                "the first of them drawn ↓",
                "its other words ↓",
                "Acc_e ↓",
                "Acc_g ↓",
                "relatives kept ↑",
                "Acc_s ↑",
            ),
            body,
        ),
        "",
    ]


def scores_lines(name: str, text: str) -> list[str]:
    found = Found(name)
    if not found.rows:
        return []
    return [f"{text} {found.note()}", "", *scores_table(found), ""]


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


def lengthy_lines() -> list[str]:
    return scores_lines(
        "long",
        "Each of the ten classes by its name, judged on prompts of 25 to 60 tokens: the thing, and "
        "after it colors, places and phrases that mean nothing for the picture "
        "(`bench/quality/tasks.py`). The wordings were chosen on other things, for how often the "
        "un-erased model draws what they ask for; its row says how often that is here.",
    )


def worlds_lines() -> list[str]:
    """The same tables on other models, on which nothing was chosen."""
    lines = []
    worlds = dict.fromkeys(row["world"] for row in committed(QUALITY) if "world" in row)
    worlds.pop(FLOW, None)
    for world in worlds:
        tables = (Found(name, world=world) for name in ("objects", "several"))
        objects, several = (found if found.rows else None for found in tables)
        if objects is None:
            continue
        lines += [
            f"**{world}**, trained by the same script on the same table of words, with fewer "
            "steps: what the words say of it is in its rows for the un-erased model. No setting "
            f"was chosen on it, neither ours nor the baselines'. {objects.note()}",
            "",
            *scores_table(objects),
            "",
        ]
        if several is not None:
            lines += [
                f"Several at once: Acc_s / H_o. {several.note()}",
                "",
                *several_table(several),
                "",
            ]
    return lines


def flow_lines() -> list[str]:
    """The tables on the flow-matching sibling."""
    names = ("objects", "several", "ablation")
    objects, several, ablation = (Found(name, world=FLOW) for name in names)
    model = committed_object("embedded_flow.json")
    if not objects.rows or model is None:
        return []
    drawn, sampling = model["names"], model["sampling"]
    lines = [
        "A stock `SD3Transformer2DModel`, trained by the same script with the same words, text "
        "encoder and autoencoder, on pictures of another seed. "
        f"Before anything is erased {100 * drawn['accuracy']:.1f} % "
        f"of {drawn['pictures']} pictures show the thing that was asked for, and "
        f"{100 * drawn['junk']:.1f} % are junk ({sampling['steps']} {sampling['sampler']} steps, "
        f"guidance {sampling['guidance_scale']}). Text enters by two maps, and the closed form is "
        f"made at both, or at one. {objects.note()}",
        "",
        *scores_table(objects),
        "",
    ]
    if several.rows:
        lines += [
            "Several at once: Acc_s / H_o. UCE has the settings of one, and no rows of what stays. "
            f"{several.note()}",
            "",
            *several_table(several),
            "",
        ]
    if ablation.rows:
        lines += [
            "What each stage does, without the check that would drop what does not help: "
            f"{ablation.note()}",
            "",
            *scores_table(ablation),
            "",
        ]
    lines += ["![A sample of each of the 304 things](embedded/flow/things.jpg)", ""]
    return lines


def model_lines() -> list[str]:
    """How well the judge recognizes the model before anything is erased."""
    found = committed_object("embedded_model.json")
    if found is None:
        return []
    judge, vae = found["judge_held_out"], found["autoencoder_held_out"]
    names, unsaid, scenes, styles = (found[k] for k in ("names", "unsaid", "scenes", "styles"))
    measures = {
        f"judge on {judge['pictures']:.0f} held-out renderings: just what is there": judge["all"],
        "of these, in color": judge["color"],
        "of these, scenes of two things in color": judge["scenes_color"],
        "judge on held-out renderings: the style": judge["style"],
        "junk that the judge calls junk": judge["junk_called_junk"],
        f"names ({names['pictures']} images)": names["accuracy"],
        "of these, junk": names["junk"],
        f"words that stood in captions ({found['said']['words']})": found["said"]["accuracy"],
        f"words that stood in none ({unsaid['tried']} tried)": unsaid["accuracy"],
        f"of these, drawn in {100 * words().counts_from:.0f} % of the images or more: they count "
        "for generality": unsaid["counted"] / unsaid["tried"],
        f"both things of scenes, of two categories ({scenes['pictures']} images)": scenes["both"],
        f"styles ({styles['pictures']} images)": styles["style"],
        "of these, the thing": styles["thing"],
    }
    body = [[name, f"{100 * value:.1f}"] for name, value in measures.items()]
    sampling = found["sampling"]
    return [
        f"The embedded model before anything is erased, {sampling['steps']} {sampling['sampler']} "
        f"steps, guidance {sampling['guidance_scale']}, recognized by its judge, percent. An image "
        "is right where the judge sees just the things that were asked for, and no junk. The "
        f"autoencoder alone keeps held-out renderings at {vae['psnr']:.1f} dB.",
        "",
        *table(("measure", "share"), body),
        "",
        "What it draws, unselected: every thing once, in the order of "
        "`realera_fast/embedded/words.json`; scenes of two things; and its styles, one a row.",
        "",
        *(f"![{about}](embedded/{name}.jpg)" for name, about in SHEETS.items()),
        "",
    ]


SHEETS = {
    "things": "A sample of each of the 304 things",
    "scenes": "Samples of scenes of two things",
    "styles": "Samples of nine styles",
}
"""Contact sheets of `bench/embedded/evaluate.py`."""


def summary_lines(further: str = "") -> list[str]:
    """Mean H_o of the methods that are in every table, and of the strict preset.

    Args:
        further: what the text says after how the rows were made.
    """
    found = {name: part for name in SUMMARY if (part := Found(name)).rows}
    if "objects" not in found:
        return []
    objects, several = found.pop("objects"), found.pop("several", None)
    tables = [part for part in (several, *found.values()) if part is not None]
    shared = [
        m
        for m in objects.ranked()
        if objects.complete(m)
        and (m in (own_method(objects), STRICT) or all(m in part.methods for part in tables))
    ]
    columns = {"objects": (objects, score("h_o"), ()), "relatives": (objects, near("h_o"), ())}
    if several is not None:
        counts = [count for count in SUMMED if count in several.tasks]
        columns |= {f"{n} at once": (several, score("h_o"), (n,)) for n in counts}
    columns |= {name: (part, score("h_o"), ()) for name, part in found.items()}
    body = [
        [bold(m), *(part.cell(m, value, tasks) for part, value, tasks in columns.values())]
        for m in shared
    ]
    first = objects.rows[0]
    return [
        f"Mean H_o, percent ± standard deviation over {len(objects.seeds)} seeds; higher is "
        "better. *Relatives*: the same objects, with nothing but near relatives for the rest. "
        "The paper's closed form runs with this library's preserve prior. Each baseline has one "
        "setting for things and styles, and one for several at once. "
        f"{first['dtype']}, {first['device']}, torch {first['torch']}.{further}",
        "",
        *table(("method", *columns), body),
        "",
    ]


SUMMARY = ("objects", "several", "styles", "characters")
"""Who is in all of these is in the summary."""
