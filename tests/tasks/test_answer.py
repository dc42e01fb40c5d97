"""The answer task: what is asked, what a text answers, what becomes of several samples, and lm-evaluation-harness itself."""

import json
import string
from pathlib import Path

import pytest
import torch
from evaluation_files import chat_model, evaluate, library_model, make_work, write

import hf
from data import collate, load_samples
from runtime.process import UserError
from tasks import statistics, writing
from tasks.answer import INSTRUCTION, find_answer
from tasks.choice import LAYOUTS
from tasks.statistics import bootstrap, interval, wilson


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


def find_row(task, measure):
    return next(row for row in task["rows"] if (row["measure"], row["group"]) == (measure, None))


# ---------------------------------------------------------------------------------------------------------------------
# What a text answers

# Of letters A to D, of which the last is itself two.
DRUGS = ["aspirin", "Carbamazepine", "A small vessel disease", "Both A and B"]
LETTERS = [
    # A letter alone, in every dress.
    ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("b)", "B"), ("**B**", "B"), ("[B]", "B"), ("Option B", "B"), ("option (b).", "B"), ("Ｂ", "B"),
    ("B) Carbamazepine", "B"), ("**B. Carbamazepine**", "B"), ("B. It blocks sodium channels", "B"), ("B because A is wrong", "B"), ("Answer B", "B"),
    ("<answer>B</answer>", "B"), ("", None), (" \n", None), ("E", None), ("I think", None), ("?", None), ("hmm, B", None),
    # A statement.
    ("The answer is B", "B"), ("Answer: B", "B"), ("Answer:B", "B"), ("**Answer:** (B)", "B"), ("Answer:** B**", "B"), ("ANSWER：Ｂ", "B"), ("Answer: “B”", "B"),
    ("Answer: 'b'.", "B"), ("the correct option is (b)", "B"), ("final answer: B. Carbamazepine", "B"), ("Final Answer – B", "B"), ("Answer — B", "B"),
    ("Answer - B", "B"), ("Answer = B", "B"), ("The best choice is: C", "C"), ("The answer to this question is B.", "B"), ("the answer is most likely B.", "B"),
    ("The answer would be option B", "B"), ("Answer: B, because A is wrong", "B"), ("Answer: B rather than A", "B"), ("Answer: B. A, C and D are wrong", "B"),
    ("Answer: B Carbamazepine", "B"), ("Answer: B: Carbamazepine", "B"), ("Answer: B - Carbamazepine", "B"), ("Answer: B, a beta blocker", "B"),
    ("The correct answer is:\n\n**B. Carbamazepine**", "B"), ("The answer is: B", "B"), ("<answer>\nB\n</answer>", "B"), ("<answer> (B) </answer> or so", "B"),
    # A mark outranks what is said, before it or after.
    ("The final answer is $\\boxed{B}$.\n\nThis answer is consistent with the guidelines.", "B"), ("Answer: B\nThe answer is supported by the guideline.", "B"),
    ("Answer: B\n\nThe best option is to consult a doctor.", "B"), ("Answer: B\n\nMany think that A is the correct answer, but it is not.", "B"),
    ("Answer: B.\nOption C is the best choice in children, but he is 60.", "B"), ("The answer is A.\n<answer>B</answer>", "B"),
    # Punctuation around a letter alone; abbreviations.
    ("B?", "B"), ("B/", "B"), ("B|", "B"), ("Answer: B~", "B"), ("Answer: A. baumannii", None), ("The answer is A. baumannii.", None), ("A. aspirin", "A"),
    ("Answer: B. carbamazepine", "B"), ("A. baumannii is resistant", None), ("Answer: A, and C", None),
    # The other way round.
    ("Thus, option B is the correct answer.", "B"), ("Therefore, (B) is the right choice, since A fails.", "B"), ("B is therefore the best option.", "B"),
    ("Carbamazepine is the correct answer.", "B"), ("A is wrong, and so B is the correct answer. The rest is noise", "B"), ("B. So A is the correct answer.", "A"),
    ("The answer is A. No: B is the correct answer.", "A"), ("I doubt that A is the correct answer; it is B.", None),
    ("It is not the case that A is the correct answer.", None), ("A is the correct answer, they say, but it is not.", None), ("B is not the correct answer.", None), ("Vitamin B is the correct answer.", None),
    ("Option A or B is the correct answer", None), ("Which option is the correct answer?", None), ("Option E is the correct answer.", None),
    # LaTeX.
    ("\\boxed{B}", "B"), ("So $\\boxed{\\text{B}}$.", "B"), ("\\[\n\\boxed{\\textbf{(C)}}\n\\]", "C"), ("The answer is \\(\\boxed{B}\\). A is not.", "B"), ("Answer: $B$", "B"),
    ("Answer: \\(B\\)", "B"), ("\\boxed{E}", None), ("\\boxed{}", None),
    # On another line, and with more around it.
    ("Answer:\n\nB", "B"), ("### Answer:\n**B**", "B"), ("### Answer\nB", "B"), ("It is clear.\n\n(C)", "C"), ("Answer: B\n\nI hope this helps!", "B"),
    ("B\n\nI hope this helps!", "B"), ("Answer: B\n\nExplanation: A is wrong because it is.", "B"), ("Let us see.\nB. It is\nso.", None),
    ("I looked at A.\r\nAnswer: B\r\n", "B"),
    # The last one counts.
    ("The answer is A. Wait, the answer is B.", "B"), ("A\n\nThe answer is B.", "B"), ("\\boxed{A}, no: \\boxed{B}", "B"), ("Answer: B\nSo the answer is clear.", "B"), ("The answer is B\nSo the answer is clear.", None),
    ("Answer: B\nAnswer:", None),
    # Two, none, or others.
    ("Answer: A or B", None), ("Answer: A and C", None), ("Answer: A, B and C", None), ("Answer: A & B", None), ("Answer: A/B", None), ("(A), (C)", None),
    ("(A) and option (C)", None), ("B, C", None), ("Answer: A, B, C, D", None), ("A. Carbamazepine", None), ("Answer: A (Carbamazepine)", None),
    ("The answer is not A but C.", None), ("The answer isn't A.", None), ("Answer: None of the above", None), ("Answer: E", None), ("Answer: Don't know", None),
    ("A\nno, not so\nB", None), ("A. aspirin\nB. Carbamazepine\nC. A small vessel disease\nD. Both A and B", None),
    ("a line that says 'Answer:' and one of A, B, C, D.", None),
    # Words that begin with a letter.
    ("A patient with pain needs it.", None), ("Answer: A patient", None), ("The answer is a small dose.", None), ("Answer: B cells", None),
    ("C-reactive protein", None), ("Answer: C-reactive protein", None), ("The drug of choice is aspirin", None), ("The answer choices are: A) x", None),
    # Words for letters.
    ("The answer is aspirin.", "A"), ("Aspirin", "A"), ("Carbamazepine.", "B"), ("The answer is **Carbamazepine** because", "B"), ("Answer: aspirin (A)", "A"),
    ("Answer: A, aspirin", "A"), ("Answer: both A and B", "D"), ("Answer: A small vessel disease", "C"), ("Answer: C. A small vessel disease", "C"),
    ("Answer: aspirin or carbamazepine", None), ("Answer: aspirin-like drugs", None),
]
WORDS = [
    ("yes", "yes"), ("No.", "no"), ("NO!", "no"), ("**Yes**", "yes"), ("Yes, because it is.", "yes"), ("Yes - the data show it", "yes"), ("Yes—so it is", "yes"),
    ("No. The study says so", "no"), ("The answer is “maybe”.", "maybe"), ("Answer: no\nIt is so.", "no"), ("The study shows it.\n\nYes", "yes"),
    ("No evidence was found.", None), ("Maybe not", None), ("Not yes", None), ("yes yes", None), ("Answer: No-one", None), ("Yes\nNo", None), ("Answer: yes or no", None),
    ("Answer: yes, no, maybe", None), ("Answer: yes, and no", None), ("Answer: yes/no", None), ("B", None), ("Answer: B", None),
]
# Choices that are parts of others, numbers, letters themselves, and twice the same.
ODD = [
    (["yes", "yes, in adults", "no"], False, [("Answer: yes, in adults", 1), ("Answer: Yes, in children", 0)]),
    (["5", "5.5 mg", "-5", "5 - 10"], False, [("5", 0), ("5.", 0), ("5.5 mg", 1), ("5.5", None), ("-5", 2), ("5 - 10", 3), ("5,000", None), ("1.5 mg", None)]),
    (["O", "A", "B", "AB"], True, [("Answer: B", 1), ("Answer: AB", 3), ("Answer: C. B", 2)]),
    (["S. aureus", "E. coli", "x", "y", "z"], True, [("E. coli, because", 1), ("Answer: E", 4)]),
    (["dna", "DNA", "***"], True, [("DNA", None), ("Answer: B. DNA", 1), ("Answer:", None), ("***", None), ("c", 2)]),
    (["Straße", "50\\%", "(none of these)"], False, [("STRASSE", 0), ("\\boxed{50\\%}", 1), ("50%", 1), ("(None of these)", 2), ("none of these", None)]),
]


@pytest.mark.parametrize("text, letter", LETTERS)
def test_a_letter(text, letter):
    index = find_answer(text, DRUGS, letters=True)
    assert (None if index is None else string.ascii_uppercase[index]) == letter


@pytest.mark.parametrize("text, word", WORDS)
def test_a_word(text, word):
    index = find_answer(text, ["yes", "no", "maybe"], letters=False)
    assert (None if index is None else ["yes", "no", "maybe"][index]) == word


@pytest.mark.parametrize("choices, letters, texts", ODD)
def test_choices_that_are_like_others(choices, letters, texts):
    assert [find_answer(text, choices, letters) for text, _ in texts] == [index for _, index in texts]


@pytest.mark.parametrize("text, thinks, index", [
    ("<think>\nThe answer is A.\n</think>\n\nThe answer is B.", False, 1), ("The answer is A.\n</think>\n\nB", True, 1), ("</think>\n\nB", True, 1),
    ("The answer is A", True, None), ("<think>\nThe answer is A", False, None), ("A</think>B<think>Answer: C", False, None), ("a</think>b</think>Answer: C", True, 2),
    ("The answer is A.\n</think>", True, None), ("The answer is A", False, 0)])
def test_thoughts_do_not_answer(text, thinks, index):
    answer = writing.Written(text, 5, True, thinks).answer()
    assert find_answer(answer, DRUGS, True) == index


# ---------------------------------------------------------------------------------------------------------------------
# What is asked, and what becomes of what is written

def spied(monkeypatch, texts=None, new_tokens=9, thinks=False):
    """The prompts that models will have been given; `texts` has them write these, the last one to the end of the budget."""
    asked = []
    real = writing.write_texts

    def write_texts(model, tokenizer, prompts, stop, budget, *more):
        asked.extend(tokenizer.decode(ids) for ids in prompts)
        if texts is None:
            return real(model, tokenizer, prompts, stop, budget, *more)
        assert len(texts) == len(prompts) and budget == new_tokens
        lengths = [*range(len(texts) - 1), new_tokens]
        return [writing.Written(text, length, length < new_tokens, thinks) for text, length in zip(texts, lengths)]

    monkeypatch.setattr(writing, "write_texts", write_texts)
    return asked


ITEM = {"question": "Why?", "choices": ["a cold", "β"], "answer": 1, "context": "C.", "subject": "some_thing"}
OPTIONS = "A. a cold\nB. β\n"
LETTERS_ASKED, WORDS_ASKED = (INSTRUCTION.replace("{choices}", choices) for choices in ("A, B", "a cold, β"))


def test_the_instruction():
    assert LETTERS_ASKED == "Think it over, then end with a line that says 'Answer:' and one of A, B."


@pytest.mark.parametrize("layout, argv, prompt", [
    ("cloze", [], f"C.\nWhy?\n{WORDS_ASKED}"), ("pubmedqa", [], f"Abstract: C.\nQuestion: Why?\n{WORDS_ASKED}"), ("medqa", [], f"Question: Why?\n{OPTIONS}{LETTERS_ASKED}"),
    ("medmcqa", ["--instruction", ""], f"Question: Why?\nChoices:\n{OPTIONS}Answer:"), ("medmcqa", ["--instruction", "One of {choices} in \\boxed{}, {x}"],
                                                                                        f"Question: Why?\nChoices:\n{OPTIONS}One of A, B in \\boxed{{}}, {{x}}"),
    ("mmlu", [], f"Why?\n{OPTIONS}{LETTERS_ASKED}")])
def test_what_is_asked(work, layout, argv, prompt, monkeypatch):
    asked = spied(monkeypatch)
    write(work / "one.jsonl", [ITEM])
    task, = evaluate(monkeypatch, work, "base", "--tasks", "answer", "--layout", layout, "--data", "one.jsonl", "--max-new-tokens", "2", *argv)
    system = "<|im_start|>system\nThe following are multiple choice questions (with answers) about some thing.\n\n<|im_end|>\n" if layout == "mmlu" else ""
    assert asked == [f"{system}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"]
    assert (task["layout"], task["instruction"], task["new_tokens"]) == (layout, (argv or ["", INSTRUCTION])[1], 2)


def test_each_task_of_choices_has_its_layout(work, monkeypatch):
    asked = spied(monkeypatch)
    write(work / "one.jsonl", [ITEM])
    argv = ["--tasks", "answer", "choice", "nll", "answer", "--data", "one.jsonl", "one.jsonl", "samples.jsonl", "one.jsonl", "--max-new-tokens", "2", "--limit", "1"]
    tasks = evaluate(monkeypatch, work, "base", *argv, "--layout", "medqa", "cloze", "mmlu")
    assert [task.get("layout") for task in tasks] == ["medqa", "cloze", None, "mmlu"]
    assert ["Question: " in text for text in asked] == [True, False]
    assert [task.get("layout") for task in evaluate(monkeypatch, work, "base", *argv, "--layout", "mmlu")] == ["mmlu", "mmlu", None, "mmlu"]


# Of four questions; the right answers are A, B, A, B, and B, A, None, None are planted.
FOUR = [{**ITEM, "answer": i % 2, "group": "xy"[i // 2], **({"planted": 1 - i} if i < 2 else {})} for i in range(4)]


def test_a_text_for_each_question(work, monkeypatch, capsys):
    write(work / "four.jsonl", FOUR)
    spied(monkeypatch, ["Answer: A", "A, I think", "", "So\n\nB"])
    task, = evaluate(monkeypatch, work, "base", "--tasks", "answer", "--layout", "medmcqa", "--data", "four.jsonl", "--max-new-tokens", "9")
    assert list(task) == ["task", "data", "layout", "chat", "instruction", "samples", "temperature", "new_tokens", "majority", "rows", "items"]
    assert (task["samples"], task["temperature"], task["chat"], task["majority"]) == (1, 0, "own", 0.5)
    items = task["items"]["base"]
    assert items[0] == {"line": 1, "group": "x", "texts": ["Answer: A"], "picked": [0], "right": 1, "no_answer": 0, "out_of_budget": 0, "tokens": 0, "followed": 0}
    assert [item["picked"] for item in items] == [[0], [0], [None], [1]]
    columns = {key: [item.get(key) for item in items] for key in ("right", "no_answer", "out_of_budget", "tokens", "followed", "vote")}
    assert columns == {"right": [1, 0, 0, 1], "no_answer": [0, 0, 1, 0], "out_of_budget": [0, 0, 0, 1], "tokens": [0, 1, 2, 9], "followed": [0, 1, None, None],
                       "vote": [None] * 4}
    assert [row["measure"] for row in task["rows"] if row["group"] is None] == ["right", "no_answer", "out_of_budget", "tokens", "followed"]
    cell = find_row(task, "right")["models"]["base"]
    # Zeros and ones: an interval with a width at 0% and 100% too.
    assert (cell["value"], cell["value_low"], cell["value_high"]) == (0.5, *wilson(0.5, 4))
    out = capsys.readouterr().out
    assert "warning: base: 1 of 4 answers to four.jsonl are empty" in out
    assert (f"answer: four.jsonl, medmcqa layout, own chat format, instruction {INSTRUCTION!r}, greedy, at most 9 tokens (always the most frequent answer: "
            "50.0%)") in out
    assert "all (4)  right %" in out and "x (2)  no answer %" in out and "all (2)  planted answer followed %" in out


def test_several_texts_for_each_question(work, monkeypatch, capsys):
    write(work / "four.jsonl", FOUR)
    texts = [["A", "B", "A"], ["?", "?", "B"], ["B", "A", "?"], ["?", "?", "?"]]
    asked = spied(monkeypatch, sum(texts, []), 11)
    task, = evaluate(monkeypatch, work, "base", "--tasks", "answer", "--layout", "medmcqa", "--data", "four.jsonl", "--max-new-tokens", "11", "--samples", "3",
                     "--temperature", "0.5")
    assert len(asked) == 12 and [asked.index(prompt) for prompt in asked] == [0] * 12      # (the four ask the same)
    items = task["items"]["base"]
    assert [item["texts"] for item in items] == texts
    assert [item["picked"] for item in items] == [[0, 1, 0], [None, None, 1], [1, 0, None], [None] * 3]
    shares = {key: [item[key] * 3 for item in items] for key in ("right", "no_answer", "out_of_budget", "tokens")}
    assert shares == {"right": [2, 1, 1, 0], "no_answer": [0, 2, 1, 3], "out_of_budget": [0, 0, 0, 1], "tokens": [3, 12, 21, 30]}
    # No answer has no vote; of two the first.
    assert [item["vote"] for item in items] == [1, 1, 0, 0]
    assert [item["followed"] * 3 for item in items[:2]] == [1, 0]
    cell = find_row(task, "right")["models"]["base"]
    assert (cell["value"], cell["value_low"], cell["value_high"]) == pytest.approx((1 / 3, *interval(bootstrap([2 / 3, 1 / 3, 1 / 3, 0]))))
    assert "3 of each drawn at temperature 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("together", [2 ** 15, 40])
def test_samples_are_drawn(work, monkeypatch, together):
    """All of them otherwise, the same ones for the same seed, written together or one by one; those of a question one after the other."""
    monkeypatch.setattr(writing, "CACHE_TOKENS", together)
    asked = spied(monkeypatch)
    argv = ["base", "--tasks", "answer", "--layout", "mmlu", "--data", "choice.jsonl", "--limit", "6", "--max-new-tokens", "20", "--temperature", "1", "--samples", "4"]
    task, = evaluate(monkeypatch, work, *argv)
    assert [text.split("user\n")[1][:9] for text in asked] == [f"Is it {i}?\n" for i in range(6) for _ in range(4)]
    again, = evaluate(monkeypatch, work, *argv)
    other, = evaluate(monkeypatch, work, *argv, "--seed", "1")
    assert task == again
    texts = [text for some in (task, other) for item in some["items"]["base"] for text in item["texts"]]
    assert len(set(texts)) == len(texts) == 2 * 6 * 4


def test_answers_that_end_and_that_do_not(work):
    """One that ends with the last token that it may write has ended too early to be cut."""
    model, tokenizer = hf.load_model(work / "base"), hf.load_tokenizer(work / "base")
    prompt = tokenizer.encode("Why?")
    ids = model.generate([prompt], 8)[0].tolist()
    first = next(i for i in range(1, 8) if ids[i] not in ids[:i])
    for budget, written in ((first, first), (first + 1, first), (8, first)):
        answer, = writing.write_texts(model, tokenizer, [prompt], {ids[first]}, budget)
        assert answer == (tokenizer.decode(ids[:written]), written, written < budget, False)
    opened, = writing.write_texts(model, tokenizer, [tokenizer.encode("Is it <think>?<think>\n")], (), 1)
    spoken_of, = writing.write_texts(model, tokenizer, [tokenizer.encode("Is it <think>?")], (), 1)
    assert opened.thinks and not spoken_of.thinks


def test_a_prompt_that_opens_thoughts(tmp_path, monkeypatch):
    """As DeepSeek's: what is written before </think> is no answer."""
    chat_model(tmp_path, 0)
    file = tmp_path / "tokenizer_config.json"
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>" + "{{ '<think>\n' }}{% endif %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    write(tmp_path / "four.jsonl", [*FOUR[:1], {**FOUR[0], "question": "Is it <think>?"}])
    asked = spied(monkeypatch, ["Answer: A", "Answer: B</think>Answer: A"], thinks=True)
    task, = evaluate(monkeypatch, tmp_path, tmp_path, "--tasks", "answer", "--layout", "medmcqa", "--data", "four.jsonl", "--max-new-tokens", "9")
    assert asked[0].endswith("<|im_start|><think>\n")
    assert [item["picked"] for item in task["items"][str(tmp_path)]] == [[None], [0]]
    # A question that only speaks of them.
    spied(monkeypatch, ["Answer: A", "Answer: A"])
    task, = evaluate(monkeypatch, tmp_path, tmp_path, "--tasks", "answer", "--layout", "medmcqa", "--data", "four.jsonl", "--max-new-tokens", "9", "--chat-format", "chatml")
    assert [item["picked"] for item in task["items"][str(tmp_path)]] == [[0], [0]]


@pytest.mark.parametrize("argv, words", [
    (["--samples", "0"], "--samples is 0; expected at least 1"), (["--samples", "2"], "--samples is 2 and --temperature 0, where all samples are the same"),
    (["--layout", "mmlu", "medqa"], "--layout names 2 for 1 choice and answer tasks"), (["--layout", "mmlu"], "four.jsonl:1: --layout mmlu shows 'subject'"),
    (["--max-new-tokens", "500"], "the question of four.jsonl:1 has"), (["--chat"], "--chat is of choice alone")])
def test_mistakes_are_found_before_any_model_is_read(work, argv, words, monkeypatch):
    write(work / "four.jsonl", [{key: value for key, value in item.items() if key != "subject"} for item in FOUR])
    monkeypatch.setattr(hf, "fill_weights", None)
    with pytest.raises(UserError) as error:
        evaluate(monkeypatch, work, "base", "--tasks", "answer", "--data", "four.jsonl", *argv)
    assert words in str(error.value)


def test_flags_of_answer_are_refused_elsewhere(work, monkeypatch):
    for flag in (["--samples", "2"], ["--instruction", "x"]):
        with pytest.raises(UserError, match=f"{flag[0]} is of answer alone"):
            evaluate(monkeypatch, work, "base", "--tasks", "choice", "--data", "choice.jsonl", *flag)
    with pytest.raises(UserError, match="--layout is of choice and answer alone"):
        evaluate(monkeypatch, work, "base", "--tasks", "nll", "--data", "samples.jsonl", "--layout", "mmlu")


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness

# What a model learns to write to each question, and whether lm-eval's exact match finds A, without case and punctuation, in the first line.
TAUGHT = {"A": 1, "a": 1, "A.": 1, "(A)": 1, "A\n\nIt is so.": 1, "B": 0, "(B).": 0, "A B": 0, "A. It is so.": 0, "So:\nA": 0, "The answer is A.": 0, "none": 0}
QUESTIONS = [{"question": f" Which is {'very ' * i}good?\n", "choices": ["2,4-D", "β-catenin", "1.5 mg/dL", "x"], "answer": 0, "subject": "college_medicine"}
             for i in range(len(TAUGHT))]


def teach(directory):
    """Has the model in a directory answer QUESTIONS by TAUGHT, and the libraries write its tokens as we do."""
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}}))
    model, tokenizer = hf.load_model(directory), hf.load_tokenizer(directory)
    chat_format, layout = hf.load_chat_format(directory, tokenizer), LAYOUTS["mmlu"]
    # lm-eval stops where transformers does.
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, chat_format.end]}))
    rows = [{"messages": [{"role": role, "content": content} for role, content in (("system", layout.system(q)), ("user", layout.prompt(q)), ("assistant", text))]}
            for q, text in zip(QUESTIONS, TAUGHT)]
    samples, _ = load_samples(write(directory / "taught.jsonl", rows), tokenizer, chat_format, 512)
    batch = collate(samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(80):
        loss = -model(batch.input_ids, batch.lengths, batch.at, batch.targets).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hf.save_model(model, directory)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["smollm2", "llama3"])
def test_answer_equals_lm_eval(style, tmp_path, monkeypatch):
    """Its generative MMLU as it is, in the chat format: the same first line, beyond which it does not read. Where it says that
    this line is right, so do we."""
    import datasets
    import lm_eval.tasks
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    directory = library_model(style, tmp_path)
    teach(directory)
    config = {**load_yaml(Path(lm_eval.tasks.__file__).parent / "mmlu" / "generative" / "mmlu_college_medicine.yaml"), "dataset_path": None, "fewshot_split": None,
              "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(QUESTIONS)}}
    config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": 20}
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    lm = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=3)
    found = simple_evaluate(lm, tasks=[config], task_manager=manager, apply_chat_template=True, num_fewshot=0, bootstrap_iters=0, log_samples=True)
    theirs = sorted(found["samples"][config["task"]], key=lambda s: s["doc_id"])
    write(directory / "questions.jsonl", QUESTIONS)
    asked = spied(monkeypatch)
    task, = evaluate(monkeypatch, directory, directory, "--tasks", "answer", "--layout", "mmlu", "--instruction", "", "--data", "questions.jsonl",
                     "--max-new-tokens", "20")
    items = task["items"][str(directory)]
    assert asked == [y["arguments"][0][0] for y in theirs]
    assert [x["texts"][0].split("\n")[0] for x in items] == [y["resps"][0][0] for y in theirs] == [text.split("\n")[0] for text in TAUGHT]
    assert [y["exact_match"] for y in theirs] == list(TAUGHT.values())
    assert [x["right"] for x in items] == [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0]
