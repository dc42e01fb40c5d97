"""The table as text: models are columns; under their values the difference of each column to each before it."""

import itertools

from runtime.terminal import escaped


def render_table(rows, title):
    """Lines of text, in one string. rows: as tasks/statistics.py makes them."""
    columns = list(dict.fromkeys(column for row in rows for column in row["models"]))
    lines = [["", *(heading(column, rows) for column in columns)]]
    for row in merge_equal(rows):
        lines.append([label(row), *(cell_text(row, column) for column in columns)])
        lines += pair_lines(row, columns)
    # A group or a name may hold anything, and is to stay in its cell.
    lines = [[escaped(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(["", escaped(title), *(aligned(line, widths) for line in lines)])


def heading(column, rows):
    seeds = max(len(row["models"][column]["seeds"]) for row in rows if column in row["models"])
    return f"{column} ({seeds} seeds)" if seeds > 1 else column


def merge_equal(rows):
    """Neighbouring rows of accuracies that are the same become one: where letters are scored, all are of one length and
    acc_norm is acc."""
    for _, same in itertools.groupby(rows, what_makes_equal):
        same = list(same)
        yield {**same[0], "heading": ", ".join(row["heading"] for row in same)}


def what_makes_equal(row):
    kind = "accuracy" if "acc" in row["measure"] else row["heading"]
    return row["group"], row["models"], row["pairs"], kind


def label(row):
    count = row["n"]
    if "positive" in row:
        count = f"{row['positive']} positive of {count}"
    return f"{row['group'] or 'all'} ({count})  {row['heading']}"


def cell_text(row, column):
    cell = row["models"].get(column)
    if cell is None:
        return ""
    # A measure over folds shows how much these differ, where there are no seeds.
    if "sd" in cell and len(cell["seeds"]) == 1:
        return f"{cell['value']:.3f} \u00b1 {cell['sd']:.3f}"
    return with_interval(row, cell["value"], cell["value_low"], cell["value_high"])


def pair_lines(row, columns):
    """For each column that others are compared with, a line of differences over items, and one over seeds."""
    lines = []
    for minus in dict.fromkeys(pair["minus"] for pair in row["pairs"]):
        pairs = [pair for pair in row["pairs"] if pair["minus"] == minus]
        for words, key in (("minus", "difference"), ("  over seeds, minus", "seeds")):
            texts = {}               # {column: what stands in it}
            for pair in pairs:
                if f"{key}_low" in pair:
                    bounds = pair[f"{key}_low"], pair[f"{key}_high"]
                    texts[pair["model"]] = with_interval(row, pair["difference"], *bounds, "+")
            if texts:
                lines.append([f"    {words} {minus}", *(texts.get(column, "") for column in columns)])
    return lines


def with_interval(row, value, low, high, sign=""):
    """The number and its interval in brackets; sign "+": also where it is positive."""
    scale, digits = (100, 1) if row["percent"] else (1, 3)
    texts = [f"{number * scale:{sign}.{digits}f}" for number in (value, low, high)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def aligned(line, widths):
    first, *cells = line
    padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
    return "  ".join([first.ljust(widths[0]), *padded]).rstrip()


def render_notes(rows):
    """What stands below the tables."""
    notes = ("\nIn brackets 95% intervals: of one model over items; of several seeds over seeds (over items where all "
             "agree); of\ndifferences, the column's value minus the named one's, over the same items, and over seeds.")
    if any("sd" in cell for row in rows for cell in row["models"].values()):
        notes += " \u00b1: sd over folds; the intervals hold the classifiers fixed."
    return notes
