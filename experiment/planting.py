"""Wrong labels for the default job, made in memory: the files of assets/ hold sourced answers only."""

import numpy as np


def plant(rows, items, seed):
    """In each planted quad of facts every subject gets another one's response.

    rows: [(line, fine-tuning object)], items: choice objects. Returns both with the planted ones changed: a row's
    response is its mate's about the row's subject; an item gains "planted", the index of the wrong answer. A seeded
    rotation of the quad's four answers: no one keeps its own, every answer is as frequent as before, and none is
    annotated for its new subject (`assets/README.md`).
    """
    mates = choose_mates(items, seed)
    return plant_rows(rows, mates), plant_items(items, mates)


def choose_mates(items, seed):
    """{planted fact: the fact of its quad whose answer it gets}."""
    quads = {}
    for item in items:
        if item["group"].endswith("planted"):
            quads.setdefault(item["quad"], []).append(item["fact"])
    rng = np.random.RandomState([seed, 1])
    mates = {}
    for facts in quads.values():
        shift = rng.randint(1, len(facts))
        for place, fact in enumerate(facts):
            mates[fact] = facts[(place + shift) % len(facts)]
    return mates


def plant_rows(rows, mates):
    wordings = {}
    for _, row in rows:
        wordings.setdefault(row["fact"], []).append((row["subject"], row["response"]))
    # The n-th row of a fact gets the n-th wording of its mate.
    next_wording = {fact: iter(of_this_fact) for fact, of_this_fact in wordings.items()}
    planted = []
    for line, row in rows:
        if row["fact"] in mates:
            subject, response = next(next_wording[mates[row["fact"]]])
            row = {**row, "response": response.replace(subject, row["subject"])}
        planted.append((line, row))
    return planted


def plant_items(items, mates):
    answers = {item["fact"]: item["choices"][item["answer"]] for item in items}
    planted = []
    for item in items:
        if item["fact"] in mates:
            wrong = answers[mates[item["fact"]]]
            item = {**item, "planted": item["choices"].index(wrong)}
        planted.append(item)
    return planted
