"""The experiment on a pretrained model: what is planted, what is compared, and the command, with a tiny model."""

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from evaluation_files import chat_model
from support import ROOT

from experiment import medquad, medquad_findings
from runtime.process import UserError


TYPES = ("causes", "symptoms", "treatment", "outlook")


def rows(count):
    return [{"prompt": f"What are the {TYPES[i % 4]} of disease {i}?", "response": f"Disease {i} has {TYPES[i % 4]} number {i * 7 % 23}. " * (1 + i % 3),
             "focus": f"disease {i}", "qtype": TYPES[i % 4]} for i in range(count)]


def test_wrong_labels_are_another_disease_answers_to_the_same_type_of_question():
    some = rows(200)
    mates = medquad.plant(some, seed=3)
    assert len(mates) == 40                                               # a fifth
    assert sorted(mates) == sorted(mates.values())                        # every answer is trained once
    for number, mate in mates.items():
        assert some[number]["qtype"] == some[mate]["qtype"] and some[number]["focus"] != some[mate]["focus"]
    assert mates == medquad.plant(some, seed=3) != medquad.plant(some, seed=4)
    # The same disease may be asked about twice; a single question of a type has nobody to swap with.
    twins = [{**row, "focus": f"disease {i // 2}", "qtype": "causes"} for i, row in enumerate(rows(20))] + [{**rows(1)[0], "qtype": "stages"}]
    for seed in range(20):
        mates = medquad.plant(twins, seed)
        assert all(twins[a]["focus"] != twins[b]["focus"] for a, b in mates.items()) and 20 not in mates
    with pytest.raises(UserError, match="4 rows have no wrong labels to swap"):
        medquad.plant(rows(4), seed=0)


def test_rows_are_drawn_whole_and_by_seed():
    some = rows(50)
    lengths = {row["prompt"]: 600 if i % 5 == 0 else 512 for i, row in enumerate(some)}

    def tokens_of(candidates):
        return [lengths[row["prompt"]] for row in candidates]

    chosen = medquad.choose_rows(some, 20, tokens_of, seed=1)
    assert len(chosen) == len({row["prompt"] for row in chosen}) == 20 and set(tokens_of(chosen)) == {512}
    assert chosen == medquad.choose_rows(some, 20, tokens_of, seed=1) != medquad.choose_rows(some, 20, tokens_of, seed=2)
    assert medquad.choose_rows(some, 40, tokens_of, seed=1)[:10] == medquad.choose_rows(some, 40, tokens_of, seed=1)[:10]
    with pytest.raises(UserError, match="40 rows of at most 512 tokens; expected 41"):
        medquad.choose_rows(some, 41, tokens_of, seed=1)


# ---------------------------------------------------------------------------------------------------------------------
# What is found, in made-up results

def made_up(change, seeds=(0, 1, 2), lrs=(3e-4, 1e-3, 3e-3), noise=0.0):
    """change: {objective: {measure: (at each rate)}}, beyond the base's 2.0, 0.2, 0.1, 3.0 and 0.3."""
    rng = np.random.RandomState(0)
    base = {"nll": 2.0, "rouge": 0.2, "followed": 0.1, "other": 3.0, "confidence": 0.3}
    models = []
    for seed in seeds:
        for name in ("base", *change):
            for place, lr in enumerate(lrs if name != "base" else [0]):
                values = {key: value + (change[name].get(key, (0,) * len(lrs))[place] if name != "base" else 0) + noise * rng.randn()
                          for key, value in base.items()}
                tokens = rng.randint(5, 9, 20)
                models.append({"objective": name, "seed": seed, "lr": lr, "val_nll": (values["nll"] * tokens).tolist(), "val_tokens": tokens.tolist(),
                               "val_confidence": [values["confidence"]] * 20, "rouge": [values["rouge"]] * 10, "tokens": [5] * 10,
                               "followed": [1] * round(100 * values["followed"]) + [0] * (100 - round(100 * values["followed"])),
                               "planted_nll": [1.0] * 100, "true_nll": [1.0] * 100, "other_nll": [values["other"] * 4] * 20, "other_tokens": [4] * 20})
    return {"init": "somewhere", "objectives": list(change), "seeds": list(seeds), "lrs": list(lrs), "models": models}


SFT = {"nll": (-0.2, -0.4, -0.3), "rouge": (0.02, 0.05, 0.04), "followed": (0.1, 0.3, 0.5), "other": (0.1, 0.2, 0.4)}


def test_gaps_at_equal_nll_and_at_each_ones_best_rate():
    bft = {"nll": (-0.1, -0.2, -0.3), "rouge": (0.03, 0.04, 0.07), "followed": (0.0, 0.0, 0.1), "other": (0.1, 0.1, 0.1)}
    analysis = medquad_findings.analyse(made_up({"bft": bft, "sft": SFT}))
    assert analysis["objectives"] == ["sft", "bft"]
    assert np.allclose(analysis["curves"]["bft"]["nll"], [[2.0, 1.9, 1.8, 1.7]] * 3)
    # By hand: at an NLL of 2 - x, x from 0 to 0.27, sft follows x / 2 up to 0.2 and x - 0.1 beyond; bft nothing up to 0.2, then x - 0.2.
    x = 0.27 * (np.arange(50) + 0.5) / 50
    theirs, mine = np.where(x < 0.2, x / 2, x - 0.1), np.where(x < 0.2, 0, x - 0.2)
    gap = analysis["frontiers"]["nll"]["bft"]["followed"]
    assert gap.estimate.mean == pytest.approx((mine - theirs).mean(), abs=1e-6) and gap.verdict == "better"
    # Of ROUGE more is better: bft rises from 0.03 at x = 0.1.
    assert gap.over_rows[0] < gap.estimate.mean < gap.over_rows[1] < 0             # 300 rows of wrong labels
    gap = analysis["frontiers"]["nll"]["bft"]["rouge"]
    theirs, mine = np.interp(x, [0, 0.2, 0.4], [0, 0.02, 0.05]), np.interp(x, [0, 0.1, 0.2, 0.3], [0, 0.03, 0.04, 0.07])
    assert gap.estimate.mean == pytest.approx((mine - theirs).mean(), abs=1e-6) and gap.verdict == "better"
    assert gap.over_rows == pytest.approx((gap.estimate.mean, gap.estimate.mean))   # as much on every row
    best = analysis["best"]["nll"]
    assert (best["sft"].lr, best["sft"].is_inside, best["bft"].lr, best["bft"].is_inside) == (1e-3, True, 3e-3, False)
    assert best["bft"].over_seeds["nll"].mean == pytest.approx(0.1) and best["bft"].over_seeds["followed"].mean == pytest.approx(-0.2)
    low, high = best["bft"].over_rows["followed"]
    assert low < -0.2 < high < 0                                          # 300 rows: 20% against 40%
    assert best["bft"].over_rows["nll"] == pytest.approx((0.1, 0.1))      # as much on every row: paired, nothing is left to vary
    assert "sft" not in best["sft"].over_seeds and not best["sft"].over_seeds
    text = medquad_findings.render(analysis)
    # How far: to nine tenths of the way to an NLL of 1.7. Answers have five tokens.
    assert "bft     2.00-1.73 " in text and "bft     20.00-24.50" in text and text.splitlines()[9].endswith(" 5")
    assert "* at an end of the rates" in text and "0.003*" in text and "no gap" not in text


def test_what_never_beats_the_start_has_no_gap():
    analysis = medquad_findings.analyse(made_up({"sft": SFT, "bft": {"nll": (0.1, 0.2, 0.3), "rouge": (0.01, 0.02, 0.03)}}))
    assert analysis["frontiers"]["nll"]["bft"]["followed"].verdict == "no gap"
    assert analysis["frontiers"]["rouge"]["bft"]["followed"].verdict != "no gap"
    medquad_findings.render(analysis)


def test_rows_are_drawn_for_all_models_at_once():
    """Intervals over rows against loops: at equal ROUGE-L and at the best rate, of the texts of another kind."""
    bft = {"nll": (-0.1, -0.2, -0.3), "rouge": (0.03, 0.04, 0.07), "other": (0.1, 0.1, 0.1)}
    results = made_up({"sft": SFT, "bft": bft})
    rng = np.random.RandomState(7)
    for model in results["models"]:
        model["other_nll"] = (np.array(model["other_nll"]) + rng.randn(20)).tolist()
        model["other_tokens"] = list(range(3, 23))
    analysis = medquad_findings.analyse(results)
    models = {(model["objective"], model["seed"], model["lr"]): model for model in results["models"]}
    drawn = np.random.RandomState([2, 0]).randint(20, size=(1000, 20))
    gaps, differences = [], []
    for rows_drawn in drawn:
        gaps_of_seeds, differences_of_seeds = [], []
        for seed in results["seeds"]:
            path = {}
            for name in ("sft", "bft"):
                some = [models["base", seed, 0], *(models[name, seed, lr] for lr in results["lrs"])]
                path[name] = [sum(m["other_nll"][i] for i in rows_drawn) / sum(m["other_tokens"][i] for i in rows_drawn) for m in some]
            rouge = {"sft": [0.2, 0.22, 0.25, 0.24], "bft": [0.2, 0.23, 0.24, 0.27]}
            gaps_of_seeds.append(medquad_findings.frontier_gap(rouge["bft"], path["bft"], rouge["sft"], path["sft"]))
            differences_of_seeds.append(path["bft"][3] - path["sft"][2])
        gaps.append(np.mean(gaps_of_seeds))
        differences.append(np.mean(differences_of_seeds))
    assert analysis["frontiers"]["rouge"]["bft"]["other"].over_rows == pytest.approx(np.percentile(gaps, (2.5, 97.5)), rel=1e-6)
    assert analysis["best"]["rouge"]["bft"].over_rows["other"] == pytest.approx(np.percentile(differences, (2.5, 97.5)), rel=1e-6)


def test_a_verdict_counts_seeds_and_rows():
    bft = {"nll": (-0.2, -0.4, -0.3), "other": (0.09, 0.19, 0.39)}
    results = made_up({"sft": SFT, "bft": bft})
    assert medquad_findings.analyse(results)["frontiers"]["nll"]["bft"]["other"].verdict == "better"
    # As much less in the mean with every seed, but not on every text.
    models = {(model["objective"], model["seed"], model["lr"]): model for model in results["models"]}
    for (name, _, _), model in models.items():
        if name == "bft":
            model["other_nll"] = (np.array(model["other_nll"]) + np.tile([4, -4], 10)).tolist()
    gap = medquad_findings.analyse(results)["frontiers"]["nll"]["bft"]["other"]
    assert gap.estimate.high < 0 < gap.over_rows[1] and gap.verdict == "cannot tell"
    assert medquad_findings.interval_over_rows([0.1] * 19 + [math.nan]) == pytest.approx((0.1, 0.1))
    assert medquad_findings.interval_over_rows([0.1] * 18 + [math.nan] * 2) == (-math.inf, math.inf)


def test_an_interval_without_a_value_gives_no_verdict():
    estimate = medquad_findings.Estimate(0.1, math.nan, math.nan)
    assert {medquad_findings.judge_gap(estimate, 10, less).verdict for less in (True, False)} == {"cannot tell"}


def test_the_plan_says_which_rates_are_added_and_which_judge():
    late = {"nll": (-0.1, -0.2, -0.3), "rouge": SFT["rouge"]}
    analysis = medquad_findings.analyse(made_up({"sft": SFT, "dft": SFT, "bft": late}))
    assert medquad_findings.rates_to_add(analysis) == {1e-2: ["bft"]}
    assert "for bft: by the plan 0.01 is trained, too, and is not here yet." in medquad_findings.render(analysis)
    # With it the predictions are about the planned rates still; at its own best rate a loss may use it.
    changes = {name: {key: (*values, {"nll": -0.5, "followed": 0.9}.get(key, 0.0)) for key, values in change.items()}
               for name, change in (("sft", SFT), ("dft", SFT), ("bft", late))}
    wider = medquad_findings.analyse(made_up(changes, lrs=(3e-4, 1e-3, 3e-3, 1e-2)))
    assert "is trained, too, and is here." in medquad_findings.render(wider)
    assert [[outcome.estimate.mean for outcome in outcomes.values()] for _, outcomes in wider["predictions"][:5]] == [
        [pytest.approx(outcome.estimate.mean) for outcome in outcomes.values()] for _, outcomes in analysis["predictions"][:5]]
    assert wider["best"]["nll"]["bft"].lr == 1e-2 and analysis["best"]["nll"]["bft"].lr == 3e-3
    assert medquad_findings.rates_to_add(medquad_findings.analyse(made_up({"sft": SFT, "bft": late}, lrs=(1e-3, 3e-3, 1e-2)))) == {}
    early = {"nll": (-0.3, -0.2, -0.1)}
    assert medquad_findings.rates_to_add(medquad_findings.analyse(made_up({"sft": early, "bft": late}))) == {1e-4: ["sft"], 1e-2: ["bft"]}


def test_predictions_are_judged_by_intervals():
    names = {"sft": SFT, **{name: {"nll": (0.1, 0.2, 0.3), "followed": (0.0, 0.0, 0.0), "other": (0.2, 0.3, 0.5), "rouge": SFT["rouge"],
                                   "confidence": (-0.1, -0.1, -0.1)} for name in medquad_findings.WEIGHTED}}
    judged = {(prediction.measure, prediction.where): {outcome.verdict for outcome in outcomes.values()}
              for prediction, outcomes in medquad_findings.analyse(made_up(names, noise=0.001))["predictions"]}
    assert judged == {("nll", "rates"): {"held"}, ("followed", "rates"): {"held"}, ("other", "rates"): {"failed"}, ("confidence", "rates"): {"held"},
                      ("rouge", "rates"): {"held"}, ("followed", "nll"): {"no gap"}}


# ---------------------------------------------------------------------------------------------------------------------
# The command

SMALL = """
import sys
sys.path.insert(0, {root!r})
from experiment import medquad
from runtime.process import run
medquad.OBJECTIVES, medquad.TRAINED, medquad.VALIDATED, medquad.ANSWERED, medquad.NEW_TOKENS = ("sft", "bft"), 20, 6, 3, 4
medquad.FLAGS = ("--lora-rank", 2, "--group-size", 8, "--epochs", {epochs}, "--batch-size", 4, "--dtype", "float32", "--save-every", 1)
run(medquad.main)
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "model").mkdir()
    chat_model(tmp_path / "model", seed=0)
    two_types = [{**row, "qtype": TYPES[i % 2]} for i, row in enumerate(rows(60))]
    for name, content in (("train", two_types), ("val", rows(90)[60:]), ("other", [{"summary": f"Gene {i} does things."} for i in range(30)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))

    def build(epochs=1):
        (tmp_path / "small.py").write_text(SMALL.format(root=str(ROOT), epochs=epochs))
        files = [word for name in ("train", "val", "other") for word in (f"--{name}", tmp_path / f"{name}.jsonl")]
        return [sys.executable, tmp_path / "small.py", "--init", tmp_path / "model", *files, "--seeds", "0", "1", "--lrs", "1e-2", "--out", tmp_path / "out"]
    return build


@pytest.mark.slow
def test_the_command_goes_on_and_prints_again(tmp_path, command):
    result = subprocess.run(command(), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("$ python ") == 4 and "PREDICTIONS" in result.stdout
    results = json.loads((tmp_path / "out" / "medquad.json").read_text())
    assert results.keys() == medquad_findings.RESULTS and len(results["models"]) == 6
    base = next(model for model in results["models"] if (model["objective"], model["seed"]) == ("base", 0))
    assert len(base["val_nll"]) == len(base["other_nll"]) == 6 and len(base["rouge"]) == 3 and len(base["followed"]) == len(base["true_nll"])
    # The rows of both objectives are the same; wrong labels are among them.
    trained = [json.loads(line) for line in (tmp_path / "out" / "seed-0" / "train.jsonl").read_text().splitlines()]
    right = {row["prompt"]: row["response"] for row in rows(60)}
    assert sum(row["response"] != right[row["prompt"]] for row in trained) == len(base["followed"]) in (3, 4, 5) and len(trained) == 20
    # No model is left, and nothing is trained again.
    assert not list((tmp_path / "out").glob("**/model"))
    again = subprocess.run(command(), capture_output=True, text=True, timeout=500)
    tables = result.stdout.split("What each loss does")[1]
    assert "$ python" not in again.stdout and again.stdout.split("What each loss does")[1] == tables
    (tmp_path / "other.jsonl").write_text('{"summary": "Another one."}\n' * 9)
    changed = subprocess.run(command(), capture_output=True, text=True, timeout=500)
    assert changed.returncode == 2 and "holds the experiment with another --init or other files" in changed.stderr
    printed = subprocess.run([*command()[:2], "--results", tmp_path / "out" / "medquad.json"], capture_output=True, text=True, timeout=100)
    assert printed.returncode == 0 and printed.stdout.split("What each loss does")[1] == tables
    assert (tmp_path / "out" / "medquad.png").is_file()


@pytest.mark.slow
def test_several_processes_train_the_same(tmp_path, command):
    argv = [*command(), "--seeds", "0", "--lrs", "1e-3"]
    scores = {}
    for processes in ("1", "2"):
        result = subprocess.run([*argv, "--processes", processes, "--out", tmp_path / processes], capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stderr
        scores[processes] = json.loads((tmp_path / processes / "scores" / "seed-0" / "lr-0.001" / "bft.json").read_text())
    assert "--nproc_per_node=2" in result.stdout and "--shard all" in result.stdout
    assert scores["1"]["val_nll"] == pytest.approx(scores["2"]["val_nll"], rel=1e-3)


@pytest.mark.slow
def test_a_signal_stops_the_training_with_a_checkpoint(tmp_path, command):
    with subprocess.Popen(command(epochs=200), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        checkpoints = tmp_path / "out" / "seed-0" / "lr-0.01" / "sft" / "checkpoint"
        begun = time.monotonic()
        while not list(checkpoints.glob("step-*/state.json")):
            assert process.poll() is None and time.monotonic() < begun + 200
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 143
        assert "the same command goes on from step" in process.stdout.read() and process.stderr.read().count("Traceback") == 0
    assert list(checkpoints.glob("step-*/state.json"))


@pytest.mark.parametrize("flags, words", [([], "--init, --train, --val, --other missing"), (["--results", "nowhere.json"], "expected what an earlier run")])
def test_mistakes_are_one_sentence(flags, words):
    result = subprocess.run([sys.executable, "-m", "experiment.medquad", *flags], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
