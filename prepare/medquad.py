"""Converts MedQuAD's XML files to question-answer JSONL, split so that no disease is in both files.

    python prepare/medquad.py MedQuAD-master --out DIR      # DIR/medquad_train.jsonl, DIR/medquad_val.jsonl

The input is the unpacked repository https://github.com/abachaa/MedQuAD (Ben Abacha and Demner-Fushman, 2019; licence
CC BY 4.0), one folder for each of twelve sites of the US National Institutes of Health. Its publishers removed the
answers of folders 10, 11 and 12 for MedlinePlus's copyright, so these give nothing. A line of the output:

    {"prompt", "response", "focus": what the page is about, "qtype": kind of question, "source": folder}
"""

import collections
import hashlib
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))              # our modules are in the root
from runtime.files import write_whole  # noqa: E402
from runtime.process import Parser, UserError, run  # noqa: E402


def text(element):
    """An element's text, each run of white space one space: line ends and indentation are the XML file's, not the
    answer's. "" for None."""
    return " ".join("".join(element.itertext()).split()) if element is not None else ""


def read_pairs(root):
    """(rows in the order of their files' paths, {reason: how many were left out}). Raises UserError naming the file."""
    rows, seen, pairs, left_out = [], set(), 0, collections.Counter()
    files = sorted(root.rglob("*.xml"))                                   # never in the file system's order
    for path in files:
        try:
            page = ET.parse(path).getroot()
        except (ET.ParseError, ValueError, LookupError, OSError) as e:    # the middle two: an unknown encoding
            raise UserError(f"{path}: not XML that can be read: {e}; expected a page of MedQuAD") from None
        focus, found = text(page.find("Focus")), list(page.iter("QAPair"))
        pairs += len(found)
        left_out["files without a QAPair"] += not found
        for pair in found:
            prompt, response = text(pair.find("Question")), text(pair.find("Answer"))
            if not response:
                left_out["pairs without an answer"] += 1
            elif not prompt or not focus:                                 # "What is (are) ?": about nothing
                left_out["pairs without a question or a focus"] += 1
            elif (prompt, response) in seen:
                left_out["duplicates"] += 1
            else:
                seen.add((prompt, response))
                rows.append({"prompt": prompt, "response": response, "focus": focus,
                             "qtype": pair.find("Question").get("qtype"), "source": path.parent.name})
    if not pairs:
        raise UserError(f"{root}: no QAPair in {len(files)} XML files; expected MedQuAD's folders, 1_CancerGov_QA ...")
    return rows, left_out


def split(rows, at_least, seed):
    """(train, val): whole focuses go to val, in a seeded order, until it has at_least rows. Raises UserError."""
    count = collections.Counter(r["focus"].casefold() for r in rows)
    held, size = set(), 0
    # By a hash: the same order on every machine and in every version of Python, whatever other focuses there are.
    for focus in sorted(count, key=lambda f: hashlib.sha256(f"{seed} {f}".encode()).digest()):
        if size >= at_least:
            break
        held.add(focus)
        size += count[focus]
    if not 0 < size < len(rows):
        raise UserError(f"--val {at_least} sends {size} of {len(rows)} pairs ({len(count)} focuses) to validation; "
                        "expected some there and some left to train on")
    return ([r for r in rows if r["focus"].casefold() not in held], [r for r in rows if r["focus"].casefold() in held])


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="the unpacked MedQuAD repository")
    parser.add_argument("--out", type=Path, required=True, help="directory for the two files")
    parser.add_argument("--val", type=int, default=900, help="validation pairs, at least")
    parser.add_argument("--seed", type=int, default=0, help="which focuses become validation")
    args = parser.parse_args()
    if not args.root.is_dir():
        raise UserError(f"{args.root}: no such directory; expected the unpacked MedQuAD repository")
    rows, left_out = read_pairs(args.root)
    for name, part in zip(("train", "val"), split(rows, args.val, args.seed)):
        path = args.out / f"medquad_{name}.jsonl"
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            write_whole(path, ((json.dumps(r) + "\n").encode() for r in part))
        except OSError as e:
            raise UserError(f"{path}: cannot be written: {e.strerror}") from None
        print(f"{path}: {len(part)} pairs, {len({r['focus'].casefold() for r in part})} focuses")
    print("left out: " + (", ".join(f"{n} {what}" for what, n in left_out.items() if n) or "nothing"))


if __name__ == "__main__":
    run(main)
