"""Tables and plots, from the result files alone; made again they are the same to the byte."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import plots
from experiments.stages import LANGUAGES, Cell, Study, stages_of
from experiments.statistics import Difference, Results, Row

PAGE = "results.md"
PLOTS = "plots"
SAME = 0.05  # relative: what counts as equal


@dataclass(frozen=True)
class Claim:
    """A statement of a paper, or of ours: row `a` has fewer errors than row `b`, or equally many."""

    text: str
    a: tuple[str, float]
    b: tuple[str, float]
    equal: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of one table, which row they are compared with, and what is claimed about them."""

    title: str
    about: str
    rows: tuple[tuple[str, float], ...]
    against: tuple[str, float]
    claims: tuple[Claim, ...] = ()


def _main(s: float) -> Table:
    lap, fixed, ours = ("lap", s), ("pathways-lsp", s), ("dynamic-wg", s)
    paper = ("dynamic-lap50", s) if s == 0.7 else ("dynamic-lap70", s)
    rows = [("dense", 0.0), ("tuned", 0.0), lap, ("lap-wg", s), fixed, ("dynamic-magnitude", s)]
    if s == 0.7:
        rows += [(f"dynamic-{source}{start}", s) for source in ("lap", "lsp") for start in (20, 50, 70)]
    else:
        rows += [paper, ("lap-long", s), ("dynamic-long", s)]
    lap_across, fixed_across, best = ("lap-across", s), ("pathways-across", s), ("dynamic-across", s)
    claims = [
        Claim("Parent: pathways with LSP masks beat one shared mask (by about 21 %)", fixed, lap),
        Claim("Parent: pathways with LSP masks are no worse than dense (about 5 % better)", fixed, ("dense", 0.0)),
        Claim("Paper: dynamic pathways from LAP are about equal to fixed pathways from LSP", paper, fixed, equal=True),
        Claim("Here: the language-aware score beats one shared mask", ours, lap),
        Claim("Here: the language-aware score beats fixed LSP pathways", ours, fixed),
    ]
    if s == 0.7:
        claims += [
            Claim("Paper: dynamic from LSP 70 % beats fixed pathways with those masks", ("dynamic-lsp70", s), fixed),
            Claim("Paper: a start at 50 % beats a start at 70 % (LAP)", ("dynamic-lap50", s), ("dynamic-lap70", s)),
            Claim("Paper: a start at 50 % beats a start at 70 % (LSP)", ("dynamic-lsp50", s), ("dynamic-lsp70", s)),
        ]
    else:
        long = ("dynamic-long", s)
        claims += [
            Claim(
                "Here: so it does when both take the steps of LSP masks and what follows them", long, ("lap-long", s)
            ),
            Claim(
                "Here: so it does with 0.7 of the steps that those pathways took, LSP runs counted",
                ("dynamic-1.4", s),
                fixed,
            ),
            Claim("Here: so it does with as many steps as those pathways took, LSP runs counted", long, fixed),
        ]
    claims += [
        Claim("Here: one ranking of all layers and a longer average beat a ranking of each layer", best, ours),
        Claim("Here: they beat one shared mask", best, lap),
        Claim("Here: so they do where the shared mask too has one ranking", best, lap_across),
        Claim("Here: they beat fixed LSP pathways", best, fixed),
    ]
    if s != 0.7:
        claims.append(Claim("Here: so they do where those too have one ranking", best, fixed_across))
    return Table(
        f"Table B: multilingual, {s:.0%} pruned",
        "Every row trains the same number of joint steps on the same batches, from the same dense model of its seed, "
        "except where it says twice; what it spends before that is in the column steps.",
        (*rows, ours, ("dynamic-across-churn", s), lap_across, fixed_across, best),
        lap,
        tuple(claims),
    )


OPTIONS = (
    *(
        "inside",
        "distil",
        "inside-distil",
        "learned",
        "hard",
        "scaled",
        "movement",
        "decay90",
        "decay995",
        "often",
        "seldom",
        "churn",
    ),
    *("late", "1.4", "long", "start50", "lap50-wg", "lsp50-wg", "variant-b", "global", "unstructured"),
)


def _options(s: float) -> Table:
    ours = ("dynamic-wg", s)
    others = ("pathways-refit", "lap", "lap-distil", "lap-long", "pathways-lsp", "pathways-lsp-distil")
    rows = [ours, *((f"dynamic-{name}", s) for name in OPTIONS), *((name, s) for name in others)]
    return Table(
        f"Table C: what the paper left for later, {s:.0%} pruned",
        "One thing changed at a time in dynamic pathways with the |w g| score; same steps but where the row says so. "
        "Two seeds: read it as directions.",
        tuple(rows),
        ours,
        tuple(
            Claim(text, (f"dynamic-{name}", s), ours)
            for name, text in (
                ("learned", "Future work 2: learned scores beat re-computed ones"),
                ("hard", "Future work 2: so do those behind hard-concrete gates"),
                ("scaled", "Future work 2: so do those with a factor per block"),
                ("start50", "Future work 3: a start at 50 % beats a start from dense"),
                ("lap50-wg", "Future work 3: so does a start from a LAP mask and its weights, LAP's steps on top"),
                ("1.4", "Here: so do as many steps as that, all from dense"),
                ("churn", "Future work 4: an interval that follows the churn beats a fixed one"),
                ("distil", "Future work 7: distillation lowers errors further"),
                ("inside", "Here: updates inside the pathways once masks are fixed lower errors further"),
            )
        ),
    )


TABLES = (_main(0.9), _main(0.7), _options(0.9))


def _percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{100 * value:{'+' if sign else ''}.{digits}f}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    low, high = _percent(found.low, sign=True), _percent(found.high, sign=True)
    return f"{_percent(found.relative, sign=True)} ({low} to {high})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _row_line(results: Results, row: Row, against: Row | None) -> str:
    masks = "masks" in next(iter(row.results.values()))
    swapped = [
        sum(result["swapped_wer"].values()) / len(result["swapped_wer"])
        for result in row.results.values()
        if "swapped_wer" in result
    ]
    overlap = [_mean_overlap(result["masks"]["overlap"]) for result in row.results.values()] if masks else []
    return _line(
        [
            row.label,
            row.seeds,
            *(_percent(row.mean(language)) for language in LANGUAGES),
            f"**{_percent(row.mean())}**" + (f" ± {_percent(row.spread())}" if row.spread() is not None else ""),
            "" if against is None or against.name == row.name else _difference(results.compare(row, against)),
            f"{sum(overlap) / len(overlap):.2f}" if overlap else "",
            _percent(sum(swapped) / len(swapped)) if swapped else "",
            _percent(row.mean_of("masks", "union"), 0) if masks else "100",
            f"{row.mean_of('cost', 'steps'):.0f}",
            f"{row.mean_of('cost', 'cpu_s') / 60:.0f}",
        ]
    )


def _mean_overlap(matrix: list[list[float]]) -> float:
    pairs = [matrix[a][b] for a in range(len(matrix)) for b in range(a)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def write_table(results: Results, table: Table) -> list[str]:
    """Markdown lines of one table and its claims."""
    against = results.row(*table.against)
    versus = against.label if against is not None else table.against[0]
    head = ("method", "seeds", *LANGUAGES, "mean WER [%]", f"against {versus} [%]", "IoU", "swapped masks")
    head += ("union [%]", "steps", "CPU min")
    lines = [f"## {table.title}", "", table.about, "", _line(head), _line(["---"] * len(head))]
    missing = []
    for name, sparsity in table.rows:
        if (name, sparsity) not in results.wanted:
            continue
        row = results.row(name, sparsity)
        if row is None:
            missing.append(name)
        else:
            lines.append(_row_line(results, row, against))
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return [*lines, "", *claim_lines(results, table.claims), ""]


def claim_lines(results: Results, claims: Sequence[Claim]) -> list[str]:
    """One line per claim: what was seen."""
    if not claims:
        return []
    lines = [_line(["claim", "difference in WER [%], 95 % interval", "each seed", "seen here?"]), _line(["---"] * 4)]
    for claim in claims:
        a, b = results.row(*claim.a), results.row(*claim.b)
        found = results.compare(a, b) if a is not None and b is not None else None
        if found is None or a is None or b is None:
            lines.append(_line([claim.text, "", "", "not measured yet"]))
            continue
        seeds = ", ".join(_percent(value, 0, sign=True) for value in found.by_seed)
        complete = len(found.by_seed) == min(a.wanted, b.wanted)
        verdict = _verdict(claim, found) + ("" if complete else f" ({len(found.by_seed)} of {a.wanted} seeds so far)")
        lines.append(_line([claim.text, _difference(found), seeds, verdict]))
    return lines


def _verdict(claim: Claim, found: Difference) -> str:
    if claim.equal:
        if -SAME < found.low and found.high < SAME:
            return f"yes, within {SAME:.0%}"
        return {"lower": "no: better", "higher": "no: worse", "open": "cannot be told apart"}[found.verdict()]
    return {"lower": "yes", "higher": "no: the opposite", "open": "cannot be told apart"}[found.verdict()]


def monolingual(results: Results) -> list[str]:
    """Table A: a line per method, a column per language."""
    head = ["method, 70 % pruned", *(f"{language} (seeds)" for language in LANGUAGES)]
    lines = [
        "## Table A: monolingual, 70 % pruned",
        "",
        "Each language alone, from the multilingual dense model; all methods train the same steps. In brackets the "
        "difference to IMP, relative, with its 95 % interval.",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    for name, sparsity in (("tuned", 0.0), ("imp", 0.7), ("lth", 0.7), ("adaptive", 0.7)):
        cells = []
        label = name
        for language in LANGUAGES:
            row = results.row(f"mono-{language}-{name}", sparsity)
            if row is None:
                cells.append("")
                continue
            label = row.label
            imp = results.row(f"mono-{language}-imp", 0.7)
            found = results.compare(row, imp) if imp is not None and name != "imp" else None
            cells.append(f"{_percent(row.mean())} ({row.seeds}) {_difference(found)}".strip())
        if any(cells):
            lines.append(_line([label, *cells]))
    claims = [
        Claim(
            f"Paper: adaptive masks beat {other.upper()}, {language}",
            (f"mono-{language}-adaptive", 0.7),
            (f"mono-{language}-{other}", 0.7),
        )
        for language in LANGUAGES
        for other in ("imp", "lth")
    ]
    return [*lines, "", *claim_lines(results, claims), ""]


def parity(results: Results) -> list[str]:
    """How far one can prune before errors pass those of dense by more than 5 %, relative."""
    lines = [
        "## Where pruning is free",
        "",
        f"The sparsity up to which a method stays within {SAME:.0%}, relative, of a dense model: same seeds, linear "
        "between the sparsities that were measured (in brackets).",
        "",
        _line(["method", "of dense, as pruning begins", "of dense, trained on for as many steps"]),
        _line(["---"] * 3),
    ]
    for name, label in plots.SWEPT:
        cells = [_parity_cell(results, name, dense) for dense in ("dense", "tuned")]
        if any(cells):
            lines.append(_line([label, *cells]))
    return [*lines, ""] if len(lines) > 6 else []


def _parity_cell(results: Results, name: str, dense: str) -> str:
    base = results.row(dense, 0.0)
    points = []
    for sparsity in plots.SPARSITIES:
        row = results.row(name, sparsity)
        found = results.compare(row, base) if row is not None and base is not None else None
        if found is not None:
            points.append((sparsity, found.relative))
    if not points:
        return ""
    measured = f"({', '.join(f'{s:.0%}' for s, _ in points)})"
    last = None
    for sparsity, relative in points:
        if relative > SAME:
            if last is None:
                return f"below {sparsity:.0%} {measured}"
            share = (SAME - last[1]) / (relative - last[1])
            return f"{last[0] + share * (sparsity - last[0]):.0%} {measured}"
        last = sparsity, relative
    return f"at least {points[-1][0]:.0%} {measured}"


def write_all(study: Study, cells: Sequence[Cell], folder: Path, out: Path) -> None:
    """The page and its plots, in the folder `out`.

    Raises:
        SystemExit: no result of the list is there; what is in `out` stays.
    """
    wanted: dict[tuple[str, float], list[int]] = defaultdict(list)
    for cell in cells:
        wanted[cell.name, cell.sparsity].append(cell.seed)
    keys = {cell.title: stages_of(study, cell)[-1].key for cell in cells}
    results = Results(folder, dict(wanted), keys)
    if results.empty:
        raise SystemExit(f"{folder} holds no result of this list; `run` makes them")
    lines = [
        "# Results",
        "",
        "Made by `make tables` from `results/`; do not edit. WER in percent on the test split (unseen voices and "
        "sentences), mean over seeds ± standard deviation over seeds. Differences are relative and paired (same "
        "utterances, same seeds), so that a row of two seeds is compared with the same two of the other row, whose "
        "mean may be of three; intervals are 95 %, by resampling utterances. A claim counts as seen when the "
        "interval is clear of zero and every seed agrees. Swapped masks: WER when every language runs with the mask of "
        "the one before it. Union: blocks in at least one pathway. Steps: optimiser steps after the dense model; CPU "
        "minutes of these, on a shared machine.",
        "",
    ]
    for table in TABLES:
        lines += write_table(results, table)
    lines += monolingual(results)
    lines += parity(results)
    lines += plots.write_plots(results, out / PLOTS)
    if results.stale:
        lines += ["", f"Results of other settings, left out: {', '.join(results.stale)}."]
    (out / PAGE).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
