"""Rows to conversations: every shape, nothing lost silently, and templates for other keys."""

import json
import sys

import pytest
from support import ASSETS

import data
import hf
from hf import Turn
from hf.conversation import as_conversation, parse_templates
from runtime.process import UserError, run


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(ASSETS)


def read(row, templates=None):
    return as_conversation(row, "FILE:1", templates)


def refusal(row, templates=None):
    """The words in which a row is refused."""
    with pytest.raises(UserError) as error:
        read(row, templates)
    words = str(error.value)
    assert words.startswith("FILE:1: ") and "\n" not in words
    return words


Q, A = "What causes gout?", "Uric acid."
ROUND = [Turn("user", Q), Turn("assistant", A)]
MESSAGES = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes

@pytest.mark.parametrize("row", [
    {"prompt": Q, "response": A},
    {"messages": MESSAGES},
    {"conversations": SHAREGPT},
    {"conversation": SHAREGPT},
    {"conversations": MESSAGES},
    {"messages": SHAREGPT},
    {"conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}]},
    {"instruction": Q, "output": A},
    {"instruction": Q, "input": "", "output": A},
    {"instruction": Q, "input": " \n", "output": A, "system": "", "history": []},
    {"instruction": Q, "input": None, "output": A, "system": None, "history": None},
    {"instruction": Q, "input": "<noinput>", "output": A},
    {"instruction": "", "input": Q, "output": A},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "causes gout?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": A}]}]},
    # What is empty is not there.
    {"messages": MESSAGES, "conversations": [], "prompt": None, "response": "", "text": "", "tools": [], "images": None},
    {"prompt": Q, "response": A, "messages": [], "tools": None, "chosen": "", "weight": None},
    # Keys that hold no conversation.
    {"prompt": Q, "response": A, "id": 1, "source": "x", "category": {"a": [1]}, "group": "g", "answer": "B", "score": 0.5},
    {"messages": [{**MESSAGES[0], "id": 7, "name": None, "tool_calls": None}, {**MESSAGES[1], "tool_calls": [], "refusal": None}]},
], ids=str)
def test_shapes_of_one_round(row):
    assert read(row) == ROUND


def test_alpacas_input_stands_below_its_instruction():
    assert read({"instruction": "Add.", "input": "1 2", "output": "3"})[0] == Turn("user", "Add.\n1 2")
    assert read({"instruction": "", "input": "1 2", "output": "3"})[0] == Turn("user", "1 2")
    assert read({"instruction": "", "input": "", "output": "3"})[0] == Turn("user", "")


def test_system_and_history_of_alpaca():
    row = {"instruction": "What lowers uric acid?", "input": "", "output": "Allopurinol.",
           "system": "You are a nephrologist. Answer in one word.", "history": [["What is gout?", "A joint disease."]]}
    expected = [Turn("system", "You are a nephrologist. Answer in one word."), Turn("user", "What is gout?"),
                Turn("assistant", "A joint disease."), Turn("user", "What lowers uric acid?"), Turn("assistant", "Allopurinol.")]
    assert read(row) == expected
    assert read({"prompt" if key == "instruction" else "response" if key == "output" else key: value
                 for key, value in row.items() if key != "input"}) == expected
    two = read({**row, "history": [["a", "b"], ["c", "d"]], "input": "Now."})
    assert [turn.content for turn in two[1:-1]] == ["a", "b", "c", "d", "What lowers uric acid?\nNow."]
    for history in ("What is gout?", [["What is gout?"]], [{"q": "a"}], ["ab"], {"a": "b"}, 3):
        assert "'history' must be a list of [question, answer]" in refusal({**row, "history": history})
    assert "'history': 'answer' is missing" in refusal({**row, "history": [["What is gout?", None]]})
    assert "'history': 'answer' is blank" in refusal({**row, "history": [["What is gout?", " "]]})


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_a_conversation_is_its_first_turn(key):
    system = Turn("system", "You are a pharmacist. Never give doses.")
    rows = [{"messages": MESSAGES}, {"conversations": SHAREGPT}, {"prompt": Q, "response": A}, {"instruction": Q, "output": A}]
    for row in rows:
        assert read({key: system.content, **row}) == [system, *ROUND]
    own = [{"role": "system", "content": system.content}, *MESSAGES]
    assert read({key: system.content, "messages": own}) == read({"messages": own}) == [system, *ROUND]
    assert f"{key!r} is another text than that of the first turn" in refusal({key: "Give doses.", "messages": own})
    assert f"{key!r} stands beside 'text'" in refusal({key: "Be brief.", "text": "Gout."})
    assert f"{key!r} is dict; expected a string" in refusal({key: {"a": 1}, **rows[0]})


def test_prompts_that_repeat_the_messages_are_read_once():
    # As ultrachat_200k is published.
    rounds = [*MESSAGES, {"role": "user", "content": "Who gets it?"}, {"role": "assistant", "content": "Adults."}]
    expected = [*ROUND, Turn("user", "Who gets it?"), Turn("assistant", "Adults.")]
    assert read({"prompt": Q, "prompt_id": "ab12", "messages": rounds}) == expected
    assert read({"prompt": Q, "response": A, "messages": MESSAGES}) == ROUND
    assert read({"instruction": Q, "output": A, "conversations": SHAREGPT, "messages": MESSAGES}) == ROUND
    assert read({"prompt": Q, "instruction": Q, "output": A}) == ROUND


@pytest.mark.parametrize("row, words", [
    ({"prompt": Q, "response": A, "messages": [{"role": "system", "content": "Be brief."}, *MESSAGES, {"role": "user", "content": "Who gets it?"},
                                               {"role": "assistant", "content": "Adults."}]}, "'messages' and 'prompt' hold different conversations"),
    ({"messages": MESSAGES, "conversations": [SHAREGPT[0], {"from": "gpt", "value": "Beer."}]}, "'messages' and 'conversations' hold different"),
    ({"prompt": Q, "response": A, "instruction": Q, "output": "Beer."}, "'prompt' and 'instruction' hold different conversations"),
    ({"conversations": SHAREGPT, "text": "Gout."}, "'conversations' and 'text' hold different conversations"),
    ({"prompt": "What is asthma?", "messages": MESSAGES}, "'prompt' holds another text than 'messages'"),
    ({"messages": MESSAGES, "response": "Beer."}, "'response' holds another text than 'messages'"),
    ({"prompt": Q, "response": A, "output": "Beer."}, "'output' holds another text than 'prompt', 'response'"),
    ({"prompt": Q, "response": A, "input": "1 2"}, "'input' holds another text than 'prompt', 'response'"),
    ({"prompt": Q, "response": A, "completion": "Beer."}, "'completion' holds another text than 'prompt', 'response'"),
    ({"messages": MESSAGES, "history": [["a", "b"]]}, "'history' holds another text than 'messages'"),
    ({"messages": MESSAGES, "reasoning": "It is."}, "'reasoning' holds another text than 'messages'"),
    ({"text": "Gout.", "prompt": Q}, "'prompt' holds another text than 'text'"),
])
def test_two_conversations_in_a_row_are_an_error_that_names_both(row, words):
    assert words in refusal(row) and "expected one" in refusal(row)


@pytest.mark.parametrize("row, keys", [
    ({"instruction": Q, "context": "", "response": A, "category": "open_qa"}, "'instruction', 'context' (empty), 'response', 'category'"),
    ({"question": Q, "answer": A}, "'question', 'answer'"),
    ({"prompt": Q, "completion": A}, "'prompt', 'completion'"),
    ({"input": Q, "output": A}, "'input', 'output'"),
    ({"prompt": Q, "response": None}, "'prompt', 'response' (empty)"),
    ({"messages": []}, "'messages' (empty)"),
    ({}, "none"),
])
def test_a_row_of_another_shape_is_told_its_keys_and_what_is_read(row, keys):
    words = refusal(row)
    assert words.startswith(f"FILE:1: the keys are {keys}; expected ")
    for shape in ('{"prompt", "response"}', '{"messages": [', '{"conversations": [', '{"instruction", "input", "output"}', '{"text"}',
                  "--prompt-template"):
        assert shape in words


# ---------------------------------------------------------------------------------------------------------------------
# What would be lost

def test_thoughts_are_kept_apart(tokenizer):
    for key in ("reasoning_content", "thinking", "reasoning"):
        answer = {"role": "assistant", "content": "Yes.", key: "Aspirin inhibits COX."}
        turns = read({"messages": [MESSAGES[0], answer]})
        assert turns[1] == Turn("assistant", "Yes.", "Aspirin inhibits COX.")
        assert read({"prompt": Q, "response": "Yes.", key: "Aspirin inhibits COX."}) == turns
        assert read({"instruction": Q, "output": "Yes.", key: "Aspirin inhibits COX."}) == turns
        assert read({"messages": [MESSAGES[0], {**answer, key: ""}]})[1].thoughts is None
        assert "thoughts in a turn of the user" in refusal({"messages": [{**MESSAGES[0], key: "Hm."}, answer]})
        assert f"{key!r} is list" in refusal({"messages": [MESSAGES[0], {**answer, key: ["a"]}]})
    both = {"role": "assistant", "content": "Yes.", "reasoning_content": "a", "thinking": "a"}
    assert read({"messages": [MESSAGES[0], both]})[1].thoughts == "a"
    words = refusal({"messages": [MESSAGES[0], {**both, "thinking": "b"}]})
    assert "'reasoning_content', 'thinking' hold different thoughts" in words
    with pytest.raises(UserError, match=r"FILE:1: chat format plain does not write the thoughts \(reasoning_content\) of turn 2"):
        data.load_samples("FILE", tokenizer, "plain", rows=[(1, {"messages": [MESSAGES[0], both]})])


TOOL = {"type": "function", "function": {"name": "bmi", "arguments": {"kg": 80}}}


@pytest.mark.parametrize("row, keys", [
    ({"tools": [TOOL], "messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": [TOOL]}]}, "'tools', 'tool_calls'"),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "function_call": {"name": "bmi"}}]}, "'function_call'"),
    ({"functions": [TOOL], "conversations": SHAREGPT}, "'functions'"),
    ({"tools": json.dumps([TOOL]), "prompt": Q, "response": A}, "'tools'"),
    ({"images": ["a.png"], "prompt": Q, "response": A}, "'images'"),
    ({"image": {"bytes": b"\x89PNG"}, "conversations": SHAREGPT}, "'image'"),
    ({"audio": "a.wav", "text": "Gout."}, "'audio'"),
    ({"messages": [{**MESSAGES[0], "images": ["a.png"]}, MESSAGES[1]]}, "'images'"),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "refusal": "I cannot."}]}, "'refusal'"),
    ({"prompt": Q, "chosen": A, "rejected": "Beer."}, "'chosen', 'rejected'"),
    ({"prompt": Q, "response": A, "rejected": "Beer."}, "'rejected'"),
])
def test_what_no_format_writes_is_named(row, keys):
    assert refusal(row).startswith(f"FILE:1: {keys} would be lost")


@pytest.mark.parametrize("role", ["tool", "developer", "function", "function_call", "observation", "ipython", "User", "", None, 3, ["user"]])
def test_unknown_roles_are_named(role):
    assert f"'role' is {role!r}; expected system, user or assistant" in refusal({"messages": [*MESSAGES, {"role": role, "content": "a"}]})
    assert f"'from' is {role!r}" in refusal({"conversations": [*SHAREGPT, {"from": role, "value": "a"}]})


def test_parts_of_a_content_that_are_no_text_are_named():
    for kind in ("image_url", "image", "input_audio", "thinking", None):
        parts = [{"type": "text", "text": "Look:"}, {"type": kind, "image_url": {"url": "a.png"}}]
        assert f"'content' has a part of type {kind!r}" in refusal({"messages": [{"role": "user", "content": parts}, MESSAGES[1]]})
    assert "'content' is list" in refusal({"messages": [{"role": "user", "content": ["a"]}, MESSAGES[1]]})
    assert "'content' is missing" in refusal({"messages": [MESSAGES[0], {"role": "assistant", "content": None}]})
    assert "'value' is missing" in refusal({"conversations": [{"from": "human", "content": "a"}, SHAREGPT[1]]})


def test_names_that_tell_speakers_apart_are_an_error():
    def named(*names):
        return {"messages": [{"role": "user", "content": Q, "name": name} for name in names] + [{**MESSAGES[1], "name": "doctor"}]}

    assert [turn.role for turn in read(named("Ann", "Ann"))] == ["user", "user", "assistant"]
    assert "'name' tells several speakers with the role user apart" in refusal(named("Ann", "Bob"))
    assert "'name' tells several speakers" in refusal(named("Ann", None))


@pytest.mark.parametrize("key", ["weight", "train", "train_on_turn", "loss_mask", "mask"])
def test_weights_say_which_turns_are_trained(key, tokenizer):
    def weighed(*weights):
        return {"messages": [turn for i, weight in enumerate(weights) for turn in (
            {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}", key: weight})]}

    row = weighed(0, 1, False, True, None, 0.0, 1.0)
    trained = [turn.is_trained for turn in read(row) if turn.role == "assistant"]
    assert trained == [False, True, False, True, True, False, True]
    (sample,), _ = data.load_samples("FILE", tokenizer, "plain", rows=[(1, row)])
    end = "<|endoftext|>"
    assert tokenizer.decode(sample.ids[sample.response]) == f"a1{end}a3{end}a4{end}a6{end}"
    for weight in (0.5, 2, -1, "0", [1], "train"):
        assert f"{key!r} of a turn is {weight!r}; expected 0 or 1" in refusal(weighed(weight))
    sharegpt = {"conversations": [{"from": "human", "value": "q", key: 0}, {"from": "gpt", "value": "a", key: 0}, {"from": "gpt", "value": "b", key: 1}]}
    assert [turn.is_trained for turn in read(sharegpt)[1:]] == [False, True]
    assert "only the assistant's are trained" in refusal({"messages": [{**MESSAGES[0], key: 1}, MESSAGES[1]]})
    # A turn that is not trained may be empty.
    assert read({"messages": [MESSAGES[0], {"role": "assistant", "content": "", key: 0}, *MESSAGES]})[1].content == ""
    for weight in (0, 0.5, False, [0, 1]):
        assert f"{key!r} is " in refusal({"prompt": Q, "response": A, key: weight})
    assert read({"prompt": Q, "response": A, key: 1}) == read({"messages": MESSAGES, key: True}) == ROUND


def test_weights_that_contradict_each_other_are_an_error():
    words = refusal({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 1, "train": False}]})
    assert "'weight', 'train' of a turn contradict each other" in words
    assert not read({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0, "train": False}]})[1].is_trained


def test_a_conversation_of_which_nothing_is_trained_is_dropped_and_counted(tokenizer):
    rows = [(1, {"messages": MESSAGES}), (2, {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]})]
    samples, counts = data.load_samples("FILE", tokenizer, rows=rows)
    assert [sample.line for sample in samples] == [1] and counts["dropped"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Texts in which a conversation is hidden

@pytest.mark.parametrize("text, mark", [
    (f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>\n", "<|im_start|>"),
    (f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{Q}<|eot_id|>", "<|start_header_id|>"),
    (f"<s>[INST] {Q} [/INST] {A}</s>", "[INST]"),
    (f"<start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n{A}<end_of_turn>", "<start_of_turn>"),
    (f"<｜begin▁of▁sentence｜><｜User｜>{Q}<｜Assistant｜>{A}", "<｜User｜>"),
    (f"<|user|>\n{Q}<|end|>\n<|assistant|>\n{A}<|end|>", "<|user|>"),
    (f"{Q} {A}<|im_end|>", "<|im_end|>"),
])
def test_a_text_that_is_written_in_a_chat_format_is_refused(text, mark):
    words = refusal({"text": text})
    assert f"'text' holds {mark}, the mark of a turn" in words and '{"messages"}' in words
    assert f"the response holds {mark}" in refusal({"a": text}, parse_templates("x", "{a}"))
    row = {"conversations": SHAREGPT, "text": text}
    assert "'text' holds" in refusal(row)


MIXED = [f"<human>: {Q} <bot>: {A}", f"<human>: {Q}\n<bot>: {A}", f"### Instruction:\n{Q}\n\n### Response:\n{A}", f"Human: {Q}\n\nAssistant: {A}",
         f"USER: {Q} ASSISTANT: {A}", f"Q: {Q}\nA: {A}", f"Question: {Q}\nAnswer: {A}", f"**User**: {Q}\n**Assistant**: {A}",
         f"问：{Q}\n答：{A}", f"Patient: {Q}\nDoctor: {A}", f"Be brief.\n\n[User]: {Q}\n[AI]: {A}"]


@pytest.mark.parametrize("text", MIXED)
def test_a_text_that_mixes_question_and_answer_is_not_trained_without_a_word(text, tokenizer):
    rows = [(1, {"text": "Gout is a disease of the joints."}), (2, {"text": text}), (3, {"text": text})]
    samples, counts = data.load_samples("FILE", tokenizer, rows=rows)
    assert len(samples) == 3 and len(counts["warnings"]) == 1
    warning = counts["warnings"][0]
    assert warning.startswith("texts that look like a question with its answer: 2, the first at FILE:2; both are trained") and '{"prompt", "response"}' in warning
    rows = [(1, {"a": text})]
    assert data.load_samples("FILE", tokenizer, rows=rows, templates=parse_templates("Go on.", "{a}"))[1]["warnings"]


@pytest.mark.parametrize("text", ["Gout: a disease. Uric acid: its cause.", "The users: all of us. The answers: none.", "Answer: yes. Question: why?",
                                  "The question is how. The answer is known.", "a: 1, b: 2", "Dr. Q: left."])
def test_other_texts_are_trained_without_a_warning(text, tokenizer):
    assert data.load_samples("FILE", tokenizer, rows=[(1, {"text": text})])[1]["warnings"] == []


def test_a_question_and_answer_in_their_own_keys_are_no_mixture(tokenizer):
    rows = [(1, {"prompt": f"Question: {Q}\nAnswer:", "response": A}), (2, {"messages": MESSAGES})]
    assert data.load_samples("FILE", tokenizer, rows=rows)[1]["warnings"] == []


# ---------------------------------------------------------------------------------------------------------------------
# Templates

def fill(row, prompt, response):
    user, assistant = read(row, parse_templates(prompt, response))
    assert (user.role, assistant.role) == ("user", "assistant") and assistant.is_trained
    return user.content, assistant.content


@pytest.mark.parametrize("row, prompt, response, expected", [
    ({"question": Q, "answer": A}, "{question}", "{answer}", (Q, A)),
    ({"question": Q, "context": "Gout.", "answer": A}, "{question}\\n{context}", "Answer: {answer}", (f"{Q}\nGout.", f"Answer: {A}")),
    ({"question": Q, "context": "Gout.", "answer": A}, "{question}\n\n{context}", "{answer}", (f"{Q}\n\nGout.", A)),
    ({"Complex_CoT": "Hm.", "Question": Q, "Response": A}, "{Question}", "<think>\\n{Complex_CoT}\\n</think>\\n\\n{Response}",
     (Q, f"<think>\nHm.\n</think>\n\n{A}")),
    ({"reasoning (reasoning_content)": "Hm.", "response (content)": A}, "Why?", "{reasoning (reasoning_content)} {response (content)}",
     ("Why?", f"Hm. {A}")),
    ({"a b": "1", "c/d": "2", "é:!r": "3", "0": "4"}, "{a b}{c/d}{é:!r}", "{0}", ("123", "4")),
    ({"a": "x"}, "{{{a}}} {{a}}", "\\boxed{{{a}}}", ("{x} {a}", "\\boxed{x}")),
    ({"a": "{b} {{ \\n", "b": "no"}, "{a}", "{a}", ("{b} {{ \\n",) * 2),   # what a row holds is no template
    ({"n": 3, "x": 0.5, "a": A}, "{n} of {x}", "{a}", ("3 of 0.5", A)),
    ({"context": {"contexts": ["One.", "Two."], "n": {"deep": "x"}}, "a": A}, "{context.contexts}", "{a} {context.n.deep}", ("One.\nTwo.", f"{A} x")),
    ({"context.contexts": "flat", "context": {"contexts": "nested"}}, "{context.contexts}", "{context.contexts}", ("flat",) * 2),
    # The flags decide, whatever else there is.
    ({"prompt": "p", "response": "r", "messages": MESSAGES, "tools": [TOOL], "chosen": A}, "{prompt}!", "{chosen}", ("p!", A)),
    ({"a": "", "b": A}, "{a}", "{b}", ("", A)),
])
def test_templates_are_filled_from_the_row(row, prompt, response, expected):
    assert fill(row, prompt, response) == expected


@pytest.mark.parametrize("row, words", [
    ({"question": Q}, "no key 'answer', which a template names; the keys are 'question'"),
    ({"question": Q, "answer": None}, "'answer', which a template names, is null"),
    ({"question": Q, "answer": {"text": A}}, "'answer', which a template names, is dict"),
    ({"question": Q, "answer": [A, 3]}, "'answer', which a template names, is list"),
    ({"question": Q, "answer": []}, "'answer', which a template names, is list"),
    ({"question": Q, "answer": True}, "'answer', which a template names, is bool"),
    ({"question": Q, "answer": float("nan")}, "'answer', which a template names, is float"),
    ({"question": Q, "answer": b"x"}, "'answer', which a template names, is bytes"),
    ({"question": None, "answer": A}, "'question', which a template names, is null"),
    ({"question": Q, "answer": " \n"}, "'response' is blank"),
    ({"question": Q, "answer": ""}, "'response' is empty"),
])
def test_what_a_template_does_not_find_is_named(row, words):
    assert words in refusal(row, parse_templates("{question}", "{answer}"))


def test_a_key_is_a_key_and_nothing_is_called():
    for name in ("a.__class__", "a.upper", "a[0]", "a!r", "a:>100000000", "a.0", "0.__init__.__globals__"):
        assert f"no key {name!r}" in refusal({"a": "x", "0": ["y"]}, parse_templates("p", f"{{{name}}}"))
    assert fill({"a": {"__class__": "x"}}, "p", "{a.__class__}") == ("p", "x")


@pytest.mark.parametrize("prompt, response, words", [
    ("{a}", "", "go together"), ("", "{a}", "go together"), (None, "{a}", "go together"), ("{a}", None, "go together"),
    ("{a", "{b}", "--prompt-template '{a' has a brace alone"), ("a}", "{b}", "has a brace alone"), ("{a}", "{}", "--response-template '{}' has a brace alone"),
    ("{{{a}}", "{b}", "has a brace alone"), ("{a}", "{a{b}", "has a brace alone"),
    ("{a}", "answer", "--response-template 'answer' names no key"),
])
def test_templates_that_cannot_be_meant_are_refused(prompt, response, words):
    with pytest.raises(UserError) as error:
        parse_templates(prompt, response)
    assert words in str(error.value)
    assert parse_templates("", "") is parse_templates(None, None) is None


def test_the_command_shows_what_templates_make_and_warns(tmp_path, monkeypatch, capsys):
    def show(*flags):
        monkeypatch.setattr(sys, "argv", ["data.py", str(tmp_path / "a.jsonl"), "--tokenizer", str(ASSETS), *flags])
        with pytest.raises(SystemExit) as exit:
            run(data.main)
        return exit.value.code, *capsys.readouterr()

    (tmp_path / "a.jsonl").write_text(json.dumps({"question": Q, "answer": A}) + "\n")
    code, out, err = show("--prompt-template", "{question}", "--response-template", "{answer}")
    assert f"{Q}\n[[{A}<|endoftext|>]]" in out and not code and err == ""
    for flags, words in (((), "the keys are 'question', 'answer'; expected"), (("--prompt-template", "{question}"), "go together"),
                         (("--prompt-template", "{question}", "--response-template", "{reply}"), "a.jsonl:1: no key 'reply'")):
        code, _, err = show(*flags)
        assert code == 2 and err.count("\n") == 1 and words in err
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": MIXED[0]}) + "\n")
    code, _, err = show()
    assert f"warning: texts that look like a question with its answer: 1, the first at {tmp_path / 'a.jsonl'}:1;" in err and not code


@pytest.mark.parametrize("row, words", [
    ({"prompt": Q, "response": A, "context": "Feet."}, "'context' holds another text"),
    ({"instruction": Q, "output": A, "Input": "Feet."}, "'Input' holds another text"),
    ({"prompt": Q, "response": A, "System": "Be brief."}, "'System' holds another text"),
    ({"prompt": Q, "response": A, "thought": "Hm."}, "'thought' holds another text"),
    ({"prompt": Q, "response": A, "systemPrompt": "Be brief."}, "'systemPrompt' would be lost"),
    ({"prompt": Q, "response": A, "rejected_response": "Beer."}, "'rejected_response' would be lost"),
    ({"prompt": Q, "response": A, "label": False}, "'label' is false"),
    ({"prompt": Q, "response": A, "loss": 0}, "'loss' is '0'"),
    ({"prompt": Q, "response": A, "weights": [0, 1]}, "'weights' would be lost"),
])
def test_other_spellings_of_what_changes_a_row(row, words):
    assert words in refusal(row)


def test_a_turn_whose_loss_is_off_is_context():
    turns = as_conversation({"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A, "loss": False},
                                               {"role": "user", "content": Q}, {"role": "assistant", "content": A, "loss": True}]}, "FILE:1")
    assert [turn.is_trained for turn in turns if turn.role == "assistant"] == [False, True]


def test_keys_that_are_not_read_are_named():
    rows = [(1, {"prompt": Q, "response": A, "id": 1, "label": True}), (2, {"prompt": Q, "response": A, "id": 2, "group": "g"})]
    _, counts = data.load_samples("FILE", hf.load_tokenizer(ASSETS), rows=rows)
    assert sorted(counts["unread"].split(", ")) == ["'id' (2)", "'label' (1)"]
