"""Where on the continuum a loss pays: numbers from made-up curves, and the command that prints them again."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT

from experiment import continuum
from runtime.process import UserError


STRATA = [f"told {wordings}x{planted}" for wordings in continuum.STRENGTHS for planted in ("", ", planted")]


def made_up(seeds=4, more_right=0.0, fewer_followed=0.0, noise=0.003, first_seed=0):
    """Curves in which bft has more right, and follows fewer, than sft at equal accuracy on what was never told, from
    the first rate on: by so much times the place of the strength."""
    rng = np.random.RandomState(0)
    never_told = np.array([0.25, 0.35, 0.45, 0.55])
    curves = {}
    for name in ("sft", "bft"):
        curves[name] = {}
        for stratum in STRATA:
            place = continuum.STRENGTHS.index(int(stratum.split("x")[0].removeprefix("told ")))
            started = np.array([0, 1, 1, 1]) * (name == "bft")
            acc = never_told + 0.05 * place + started * more_right * place
            if stratum == continuum.NEVER_TOLD:
                acc = never_told
            measures = {"acc": acc, "confidence": np.full(4, 0.01 * 2 ** place)}
            if "planted" in stratum:
                measures["followed"] = never_told - 0.2 - started * fewer_followed * place
            curves[name][stratum] = {key: (values + noise * rng.randn(seeds, 4) * (stratum != continuum.NEVER_TOLD)).tolist()
                                     for key, values in measures.items()}
    return {"objectives": ["bft", "sft"], "seeds": list(range(first_seed, first_seed + seeds)), "lrs": [1e-4, 1e-3, 1e-2], "curves": curves}


def test_gaps_are_those_that_were_put_in():
    analysis = continuum.analyse(made_up(more_right=0.02, fewer_followed=0.03, noise=0.001))
    assert analysis["objectives"] == ["sft", "bft"]
    assert np.allclose(analysis["levels"]["bft"], (0.25, 0.25 + 0.9 * 0.3))
    # Up to the first rate the difference grows from nothing: half of it, over a third of nine tenths of the way.
    share = 1 - 0.5 * (0.1 / 0.27)
    for place, strength in enumerate(analysis["strengths"]):
        assert strength.wordings == continuum.STRENGTHS[place]
        assert strength.confidence == pytest.approx(0.01 * 2 ** place, abs=0.002)
        right, followed, best = (strength.gaps["bft", kind] for kind in continuum.KINDS)
        if place > 0:
            assert right.estimate.mean == pytest.approx(0.02 * place * share, abs=0.004)
            assert right.estimate.low < right.estimate.mean < right.estimate.high
            assert right.verdict == followed.verdict == best.verdict == "better"
            # Both are best at the last rate; there bft has so much more of both kinds of facts.
            assert best.estimate.mean == pytest.approx(0.02 * place, abs=0.003)
        assert followed.estimate.mean == pytest.approx(-0.03 * place * share, abs=0.004)


def test_worse_is_said_too_and_all_intervals_hold_at_once():
    analysis = continuum.analyse(made_up(more_right=-0.02, fewer_followed=-0.03, noise=0.001))
    last = analysis["strengths"][-1]
    assert {last.gaps["bft", kind].verdict for kind in continuum.KINDS} == {"worse"}
    assert last.gaps["bft", "right"].estimate.high < 0 < last.gaps["bft", "followed"].estimate.low
    # Along frontiers of means over the seeds: the jackknife, by a loop.
    condensed = made_up()
    estimate = continuum.analyse(condensed)["strengths"][3].gaps["bft", "followed"].estimate

    def gap(seeds):
        return continuum.frontier_gap(*(np.mean([condensed["curves"][name][stratum][measure][seed] for seed in seeds], axis=0)
                                        for name, stratum, measure in (("bft", "told 0x", "acc"), ("bft", "told 4x, planted", "followed"),
                                                                       ("sft", "told 0x", "acc"), ("sft", "told 4x, planted", "followed"))))
    without = [gap([seed for seed in range(4) if seed != left_out]) for left_out in range(4)]
    assert estimate.mean == pytest.approx(gap(range(4)))
    # Six strengths of one objective at once: Student's t with 3 degrees of freedom is 3.18 at 2.5%, 6.23 at 2.5% / 6.
    assert estimate.high - estimate.mean == pytest.approx(6.23 * 3 ** 0.5 * np.std(without), rel=0.01)


def test_what_is_gained_over_the_base():
    """At each strength at its own best rate; over all strengths together at one."""
    condensed = made_up(noise=0)
    for wordings in continuum.STRENGTHS:
        for stratum, path in ((f"told {wordings}x", [0.5, 0.6, 0.4, 0.5]), (f"told {wordings}x, planted", [0.5, 0.4, 0.3, 0.2])):
            # sft loses wherever it was told, the less the lower the rate; where it was not, it gains at the last rate.
            condensed["curves"]["sft"][stratum]["acc"] = [[0.5, 0.5, 0.6, 0.9] if wordings == 0 else path] * 4
            condensed["curves"]["bft"][stratum]["acc"] = [[0.5, 0.5, 0.7, 0.4]] * 4
    analysis = continuum.analyse(condensed)
    gains = {strength.wordings: strength.gains for strength in analysis["strengths"]}
    assert (gains[0]["sft"].lr, gains[0]["sft"].is_inside, gains[0]["sft"].estimate.mean) == (1e-2, False, pytest.approx(0.4))
    assert (gains[8]["sft"].lr, gains[8]["sft"].is_inside, gains[8]["sft"].estimate.mean) == (1e-4, False, pytest.approx(0))
    assert (gains[8]["bft"].lr, gains[8]["bft"].is_inside, gains[8]["bft"].estimate.mean) == (1e-3, True, pytest.approx(0.2))
    # Of six strengths one gains at the last rate, five lose 0.15.
    assert analysis["gains"]["sft"].lr == 1e-4 and analysis["gains"]["sft"].estimate.mean == pytest.approx(0)
    assert analysis["gains"]["bft"].estimate.mean == pytest.approx(0.2)
    assert np.allclose(analysis["strengths"][3].right["sft"], [0.5, 0.5, 0.35, 0.35])
    text = continuum.render(analysis)
    assert "+0.0 [0.0,0.0] at 0.0001*" in text and "+20.0 [20.0,20.0] at 0.001 " in text and "+40.0 [40.0,40.0] at 0.01* " in text


def test_the_best_rate_is_chosen_by_the_other_seeds():
    """A rate that is best by luck, in one seed alone, is not that seed's."""
    condensed = made_up(noise=0)
    for stratum in ("told 4x", "told 4x, planted"):
        condensed["curves"]["sft"][stratum]["acc"] = [[0.5, 0.4, 0.6, 0.5]] * 4
        condensed["curves"]["bft"][stratum]["acc"] = [[0.5, 0.4, 0.6, 0.5]] * 3 + [[0.5, 0.9, 0.6, 0.5]]
    strength = continuum.analyse(condensed)["strengths"][3]
    assert strength.gaps["bft", "best"].estimate.mean == 0


def test_one_seed_says_nothing():
    with pytest.raises(UserError, match="one seed has no intervals"):
        continuum.analyse(made_up(seeds=1))


@pytest.mark.parametrize("fewer, verdicts", [(0.05, {8: "held", 18: "held"}), (-0.05, {8: "failed", 18: "failed"})])
def test_predictions_are_judged_by_intervals(fewer, verdicts):
    analysis = continuum.analyse(made_up(fewer_followed=fewer, noise=0.001))
    for prediction, outcomes in analysis["predictions"]:
        assert {wordings for _, wordings in outcomes} == set(prediction.strengths)
        if prediction.strengths == (8, 18):
            assert {wordings: outcome.verdict for (_, wordings), outcome in outcomes.items()} == verdicts
        if prediction.kind == "right":
            assert all(outcome.verdict == "held" for outcome in outcomes.values())
    wide = continuum.analyse(made_up(fewer_followed=0.0, noise=0.1))
    assert "open" in {outcome.verdict for _, outcomes in wide["predictions"] for outcome in outcomes.values()}


@pytest.mark.parametrize("more, verdicts", [(0.03, {2: "held", 4: "held"}), (-0.03, {2: "failed", 4: "failed"}), (0, {2: "open", 4: "open"})])
def test_what_was_seen_in_ten_seeds_is_judged_by_others(more, verdicts):
    assert len(continuum.analyse(made_up())["predictions"]) == 3
    condensed = made_up(more_right=more, noise=0.001, first_seed=10)
    # Of those that were never told, some more: one point, since half of them are planted.
    planted = condensed["curves"]["bft"]["told 0x, planted"]
    planted["acc"] = (np.array(planted["acc"]) + 0.02).tolist()
    analysis = continuum.analyse(condensed)
    best, of_never_told, since = analysis["predictions"][3:]
    assert {wordings: outcome.verdict for (_, wordings), outcome in best[1].items()} == verdicts
    assert of_never_told[1]["bft", 0].verdict == "failed"                 # predicted are fewer
    assert since[1]["bft", 2].estimate.mean == pytest.approx(2 * more - 0.01, abs=0.002)
    assert since[1]["bft", 2].verdict == ("held" if more > 0 else "failed")
    # What is said before anything is trained.
    assert "own best rate" in continuum.introduce(("sft", "bft"), range(10, 12), (0.1,))
    assert "own best rate" not in continuum.introduce(("sft", "bft"), range(9, 12), (0.1,))


def test_what_is_kept_of_the_items():
    """Means over the facts of each stratum, against loops."""
    rng = np.random.RandomState(0)
    models = []
    for seed in (3, 5):
        for name, lr in [("base", 0), *itertools.product(("sft", "bft"), (0.1, 0.2))]:
            items = []
            for stratum in STRATA[:4] * 3:
                item = {"line": len(items), "group": stratum, "acc": int(rng.rand() < 0.5), "nll": rng.rand()}
                if "planted" in stratum:
                    item |= {"followed": int(rng.rand() < 0.5), "planted_nll": rng.rand()}
                items.append(item)
            models.append({"objective": name, "seed": seed, "lr": lr, "items": items})
    results = {"objectives": ("sft", "bft"), "seeds": [3, 5], "lrs": [0.1, 0.2], "models": models, "gradient": None}
    condensed = json.loads(json.dumps(continuum.condense(results)))
    assert condensed.keys() == continuum.KEYS
    for model in models:
        names = ("sft", "bft") if model["objective"] == "base" else (model["objective"],)
        place = [0, 0.1, 0.2].index(model["lr"])
        for name, stratum in itertools.product(names, STRATA[:4]):
            items = [item for item in model["items"] if item["group"] == stratum]
            kept = condensed["curves"][name][stratum]
            expected = {"acc": np.mean([i["acc"] for i in items]), "confidence": np.mean([np.exp(-i["nll"]) for i in items])}
            if "planted" in stratum:
                expected["followed"] = np.mean([item["followed"] for item in items])
            assert kept.keys() == expected.keys()
            for key, value in expected.items():
                assert kept[key][[3, 5].index(model["seed"])][place] == pytest.approx(value, abs=1e-5)


def print_again(path, *flags):
    return subprocess.run([sys.executable, "-m", "experiment.continuum", path, *flags], cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_it_is_printed_and_drawn_again(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(made_up(fewer_followed=0.03)))
    result = print_again(path)
    assert result.returncode == 0, result.stderr
    assert "4 seeds" in result.stdout and "from 25.0% to 52.0%" in result.stdout and "PREDICTIONS" in result.stdout
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    # Some of its seeds, without a picture: as if there were no others.
    some = print_again(path, "--seeds", "3", "1")
    assert some.returncode == 0 and "2 seeds" in some.stdout and "picture" not in some.stdout
    expected = made_up(fewer_followed=0.03)
    for measures in (measures for strata in expected["curves"].values() for measures in strata.values()):
        measures.update({key: [values[3], values[1]] for key, values in measures.items()})
    assert some.stdout == continuum.render(continuum.analyse({**expected, "seeds": [3, 1]})) + "\n"
    assert "not among" in print_again(path, "--seeds", "7").stderr
    for content, words in (("{}", "it has the keys"), ("[1]", "expected what an earlier run"), ("nonsense", "Expecting value")):
        path.write_text(content)
        result = print_again(path)
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_sft_is_what_others_are_compared_with():
    curves = made_up()
    curves["objectives"] = ["bft"]
    with pytest.raises(UserError, match="expected sft"):
        continuum.analyse(curves)
