"""Converts published medical multiple-choice sets to the JSONL that `tasks.choice.load_choice` reads.

    python prepare/choice.py pubmedqa data/ori_pqal.json --ids data/test_ground_truth.json --out pubmedqa_test.jsonl
    python prepare/choice.py medmcqa dev.json --out medmcqa_dev.jsonl
    python prepare/choice.py medqa questions/US/4_options/phrases_no_exclude_test.jsonl --out medqa_test.jsonl
    python prepare/choice.py mmlu data/test/anatomy_test.csv data/test/college_medicine_test.csv --out mmlu.jsonl

PubMedQA (https://github.com/pubmedqa/pubmedqa, MIT) keeps its labelled part in its repository; --ids names the items of
its test split. MedMCQA (https://github.com/medmcqa/medmcqa, MIT) and MedQA (https://github.com/jind11/MedQA, MIT; also
questions/US/test.jsonl, with five options) link to their files from their README, and so does MMLU
(https://github.com/hendrycks/test, MIT), which has a file for each subject. A line of the output, its texts as
published, white space and all, as lm-evaluation-harness shows them:

    {"question", "choices", "answer": index, "context": PubMedQA's abstract, "group": subject of MedMCQA and MMLU, "id":
    if any, "subject": MMLU's}
"""

import csv
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))              # our modules are in the root
from runtime.files import write_whole  # noqa: E402
from runtime.process import Parser, UserError, run  # noqa: E402
from runtime.rows import read_jsonl  # noqa: E402


DECISIONS = ["yes", "no", "maybe"]


def text(row, key, where):
    value = row.get(key)
    if type(value) in (int, float) and value == value:                    # an option such as 0.01, not in quotes
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} is {value!r}; expected some text")
    return value


def read_object(path):
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON: {e}; expected one object with PubMed ids as keys") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: expected one JSON object with PubMed ids as keys, and at least one")
    return found


def pubmedqa(path, ids=None):
    """The items of a PubMedQA file: those that the file `ids` names, or all. Raises UserError."""
    rows, items = read_object(path), []
    for pmid, label in (read_object(ids) if ids else dict.fromkeys(rows)).items():
        if pmid not in rows:
            raise UserError(f"{ids}: id {pmid} is not in {path}; expected ids of that file")
        where, row = f"{path}: id {pmid}", rows[pmid]
        contexts = row.get("CONTEXTS") if isinstance(row, dict) else None
        if not isinstance(contexts, list) or not all(isinstance(c, str) for c in contexts):
            raise UserError(f"{where}: no list of texts under 'CONTEXTS'; expected an item of PubMedQA")
        answer = row.get("final_decision")
        if answer not in DECISIONS:
            raise UserError(f"{where}: 'final_decision' is {answer!r}; expected yes, no or maybe")
        if ids and label != answer:
            raise UserError(f"{ids}: id {pmid} is {label!r}; expected {answer!r}, its 'final_decision' in {path}")
        items.append({"context": "\n".join(contexts), "question": text(row, "QUESTION", where), "choices": DECISIONS,
                      "answer": DECISIONS.index(answer), "id": pmid})
    print(f"{path}: {len(items)} of {len(rows)} items taken")
    return items


def medmcqa(path):
    """The items of a MedMCQA file, whether it counts the options from 1 or from 0. Raises UserError."""
    rows = list(read_jsonl(path))
    for line, row in rows:
        cop = row.get("cop")
        if cop is None or cop == -1:
            raise UserError(f"{path}:{line}: 'cop' is {'missing' if cop is None else cop}: the test split is published "
                            "without answers; expected train.json or dev.json")
        if type(cop) is not int or not 0 <= cop <= 4:
            raise UserError(f"{path}:{line}: 'cop' is {cop!r}; expected the number of the right option, 1 to 4")
    cops = {row["cop"] for _, row in rows}
    if (0 in cops) == (4 in cops):                                        # over the whole file: one line cannot tell
        raise UserError(f"{path}: 'cop' takes the values {', '.join(map(str, sorted(cops)))}, which does not tell "
                        "whether it counts from 0 or from 1; expected a 0 or a 4 among them, and not both")
    first = 0 if 0 in cops else 1
    print(f"{path}: 'cop' counts from {first}, as {'its publishers do' if first else 'the version on Hugging Face'}")
    return [{"question": text(row, "question", f"{path}:{line}"),
             "choices": [text(row, f"op{letter}", f"{path}:{line}") for letter in "abcd"],
             "answer": row["cop"] - first, "group": row.get("subject_name"), "id": row.get("id")} for line, row in rows]


def medqa(path):
    """The items of a MedQA file, of four or five options. Raises UserError."""
    items = []
    for line, row in read_jsonl(path):
        where, options, answer, index = f"{path}:{line}", row.get("options"), row.get("answer"), row.get("answer_idx")
        if not isinstance(options, dict):
            raise UserError(f"{where}: 'options' is {options!r}; expected an object, letters to texts")
        letters = sorted(options)
        right = [i for i, k in enumerate(letters) if options[k] == answer and k == (index or k)]
        if len(right) != 1:
            raise UserError(f"{where}: 'answer' {answer!r} with 'answer_idx' {index!r} is {len(right)} of the options; "
                            "expected exactly one")
        items.append({"question": text(row, "question", where), "choices": [text(options, k, where) for k in letters],
                      "answer": right[0]})
    return items


def mmlu(path):
    """The items of a subject's CSV file: question, four options, letter; no header. Raises UserError."""
    items, subject = [], path.stem.removesuffix("_test").removesuffix("_val").removesuffix("_dev")
    try:
        with open(path, newline="", encoding="utf-8") as f:
            for row in csv.reader(f):
                if len(row) != 6 or row[5] not in list("ABCD") or not all(field.strip() for field in row):
                    raise UserError(f"{path}: row {len(items) + 1} is {str(row)[:80]}; expected a question, four "
                                    "options, and A, B, C or D")
                items.append({"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5]), "group": subject,
                              "subject": subject})
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    return items


SETS = {"pubmedqa": pubmedqa, "medmcqa": medmcqa, "medqa": medqa, "mmlu": mmlu}


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("file", type=Path, nargs="+", help="as published")
    parser.add_argument("--ids", type=Path, help="pubmedqa: the file that names a split's items and their labels")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.ids and args.set != "pubmedqa":
        raise UserError(f"--ids is for pubmedqa; the splits of {args.set} are files")
    items = [item for file in args.file for item in SETS[args.set](file, *([args.ids] if args.ids else []))]
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, ((json.dumps(item) + "\n").encode() for item in items))
    except OSError as e:
        raise UserError(f"{args.out}: cannot be written: {e.strerror}") from None
    print(f"{args.out}: {len(items)} items")


if __name__ == "__main__":
    run(main)
