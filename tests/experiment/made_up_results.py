"""Results of the default job that are made up, so that every finding is known beforehand."""

import itertools

from experiment.findings import FOLLOWED, NOVEL, STRATA


ITEMS = 20                          # of each stratum


def make_results(objectives, numbers, seeds=3, rates=2):
    """numbers(objective, seed, i-th learning rate or -1) -> {(stratum, measure): how many of 20 items, or for nll and
    planted_nll the value}."""
    models = []
    bases = [("base", seed, -1) for seed in range(seeds)]
    for name, seed, i in bases + list(itertools.product(objectives, range(seeds), range(rates))):
        given = numbers(name, seed, i)
        items = []
        for stratum in STRATA:
            for k in range(ITEMS):
                item = {"group": stratum, "acc": int(k < given[stratum, "acc"]), "nll": given[stratum, "nll"]}
                if stratum == "planted":
                    item |= {"followed": int(k < given[FOLLOWED]), "planted_nll": given["planted", "planted_nll"]}
                items.append(item)
        models.append({"objective": name, "seed": seed, "lr": 0.1 * (i + 1), "items": items})
    gradient = {"p": [0.005, 0.5], "C": [0.2, 0.2], "sft": [0.995, 0.5], "bft": [0.004, 0.2]}
    return {"objectives": list(objectives), "seeds": list(range(seeds)), "lrs": [0.1 * (i + 1) for i in range(rates)],
            "models": models, "gradient": gradient}


def make_simple_results(novel, followed, seeds=3):
    """novel, followed: {objective: [how many of 20 at each learning rate]}. Each seed adds one to the wrong labels; all
    else is the same for all."""
    def numbers(name, seed, i):
        given = {(stratum, "acc"): 10 for stratum in STRATA} | {(stratum, "nll"): 1.0 for stratum in STRATA}
        given["planted", "planted_nll"] = 4.0
        given[NOVEL] = 5 if i < 0 else novel[name][i]
        given[FOLLOWED] = 0 if i < 0 else followed[name][i] + seed
        return given

    return make_results(novel, numbers, seeds, len(next(iter(novel.values()))))


def make_random_results(rng, names, seeds=3):
    """Three learning rates. Returns (results, {(name, seed, i): what `numbers` gave})."""
    drawn = {}

    def numbers(name, seed, i):
        given = {(stratum, "acc"): rng.randint(6, 18) for stratum in STRATA}
        given |= {(stratum, "nll"): rng.uniform(0.5, 4) for stratum in STRATA}
        given["planted", "followed"] = rng.randint(3, 12)
        given["planted", "planted_nll"] = rng.uniform(4, 5)
        given["novel", "acc"] = 4 + 2 * (i + 1) + rng.randint(0, 3)
        if i == 2 and name == "bft":
            given["novel", "acc"] -= 4                                    # a peak before it
        drawn[name, seed, i] = given
        return given

    return make_results(names, numbers, seeds, rates=3), drawn
