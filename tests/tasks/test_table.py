"""The table as text, to the character."""

from tasks.table import render_notes, render_table


def cell(value, low, high, seeds=1, **more):
    return {"value": value, "value_low": low, "value_high": high, "seeds": [value] * seeds, **more}


def row(measure, models, pairs=(), group=None, percent=True, heading=None, **more):
    return {"group": group, "measure": measure, "heading": heading or f"{measure} %", "percent": percent, "n": 20, "models": models,
            "pairs": list(pairs), **more}


def test_models_are_columns_and_differences_stand_below():
    pair = {"model": "long name", "minus": "a", "difference": 0.25, "difference_low": -0.05, "difference_high": 0.5}
    models = {"a": cell(0.5, 0.3, 0.7), "long name": cell(0.75, 0.6, 0.9, seeds=2)}
    rows = [row("acc", models, [pair]), row("acc_norm", models, [pair]),
            row("nll", models, [{**pair, "seeds_low": -1, "seeds_high": 1}], percent=False, heading="NLL"),
            row("followed", {"a": cell(0, 0, 0.1)}, group="planted")]
    assert render_table(rows, "A title").split("\n") == [
        "",
        "A title",
        "                                                a      long name (2 seeds)",
        "all (20)  acc %, acc_norm %     50.0 [30.0, 70.0]        75.0 [60.0, 90.0]",
        "    minus a                                            +25.0 [-5.0, +50.0]",
        "all (20)  NLL                0.500 [0.300, 0.700]     0.750 [0.600, 0.900]",
        "    minus a                                        +0.250 [-0.050, +0.500]",
        "      over seeds, minus a                          +0.250 [-1.000, +1.000]",
        "planted (20)  followed %          0.0 [0.0, 10.0]",
    ]


def test_rows_that_differ_in_anything_stay_two():
    first = row("acc", {"a": cell(0.5, 0.3, 0.7)})
    for other in (row("acc_norm", {"a": cell(0.6, 0.3, 0.7)}), row("acc_norm", {"a": cell(0.5, 0.3, 0.7)}, group="x"),
                  row("rouge", {"a": cell(0.5, 0.3, 0.7)})):
        assert len(render_table([first, other], "").split("\n")) == 5


def test_an_area_under_the_curve_shows_its_spread_over_folds():
    rows = [row("auc", {"random": cell(0.5, 0.4, 0.6, seeds=5, sd=0.05), "m": cell(0.7, 0.6, 0.8, sd=0.04)}, percent=False, heading="profile",
                positive=7)]
    last = render_table(rows, "").split("\n")[-1]
    assert last.split("  ") == ["all (7 positive of 20)", "profile", "0.500 [0.400, 0.600]", "0.700 \u00b1 0.040"]
    assert "\u00b1: sd over folds" in render_notes(rows) and "\u00b1" not in render_notes([row("acc", {"a": cell(0.5, 0.3, 0.7)})])
