"""Wrong labels are wrong, as frequent as the right ones, and the same for the same seed."""

from support import ASSETS

from experiment.planting import plant
from runtime.rows import read_jsonl
from tasks.choice import load_choice


def test_planting_deranges_answers_inside_quads():
    rows, items = list(read_jsonl(ASSETS / "finetune.jsonl")), load_choice(ASSETS / "choice.jsonl")
    planted_rows, planted_items = plant(rows, items, seed=0)
    answer = {item["fact"]: item["choices"][item["answer"]] for item in items}
    wrong = {item["fact"]: item["choices"][item["planted"]] for item in planted_items if "planted" in item}
    assert set(wrong) == {item["fact"] for item in items if item["group"] == "planted"}
    assert all(wrong[fact] != answer[fact] for fact in wrong)
    # Every answer is as frequent as before.
    assert sorted(wrong.values()) == sorted(answer[fact] for fact in wrong)
    for (line, before), (line_after, after) in zip(rows, planted_rows):
        assert line == line_after and before["prompt"] == after["prompt"]
        if before["fact"] in wrong:
            assert after["subject"] in after["response"] and wrong[before["fact"]] in after["response"]
            mates = [row["subject"] for _, row in rows if row["quad"] == after["quad"] and row["fact"] != after["fact"]]
            assert not any(mate in after["response"] for mate in mates)
        else:
            assert before == after
    assert plant(rows, items, seed=0) == (planted_rows, planted_items) != plant(rows, items, seed=1)


def test_an_item_only_gains_its_wrong_answer():
    items = load_choice(ASSETS / "choice.jsonl")
    _, planted_items = plant(list(read_jsonl(ASSETS / "finetune.jsonl")), items, seed=3)
    assert [{key: value for key, value in item.items() if key != "planted"} for item in planted_items] == items
