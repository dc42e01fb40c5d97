"""Converts GeneAgent's gene sets to the JSONL that `eval.py --tasks process` reads.

    python prepare/genesets.py Datasets/NeST/NeST.tsv --out nest.jsonl
    python prepare/genesets.py Datasets/MsigDB/MsigDB.csv --out msigdb.jsonl
    python prepare/genesets.py BP_terms_All.csv --out background.jsonl

The files are those of https://github.com/ncbi-nlp/GeneAgent (a United States Government Work): a header, then a set a
row, its genes apart by commas or spaces. BP_terms_All.csv has the names that their evaluation compares with, for
--candidates. A line of the output: {"id", "genes": [...], "process": its name}.
"""

import csv
import json
import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))              # our modules are in the root
from runtime.files import write_whole  # noqa: E402
from runtime.process import Parser, UserError, run  # noqa: E402


IDS, NAMES = ("ID", "NEST ID", "GO"), ("Name", "name_new", "Term_Description", "Truth Label")


def gene_sets(path):
    """The sets of a file. Raises UserError."""
    sets = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = csv.DictReader(f, delimiter="\t" if path.suffix == ".tsv" else ",")
            columns = [[c for c in rows.fieldnames or [] if c in known] for known in (IDS, ("Genes",), NAMES)]
            if not all(len(found) == 1 for found in columns):
                raise UserError(f"{path}: the header is {rows.fieldnames}; expected Genes, one of {', '.join(IDS)}, "
                                f"and one of {', '.join(NAMES)}")
            for number, row in enumerate(rows, 2):
                key, genes, name = ((row[c] or "").strip() for c, in columns)
                genes = re.split(r"[,\s]+", genes)
                if not name or "" in genes:
                    raise UserError(f"{path}: row {number} is {str([*row.values()])[:80]}; expected genes and a name")
                sets.append({"id": key, "genes": genes, "process": name})
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    return sets


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="as published, .csv or .tsv")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sets = gene_sets(args.file)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, ((json.dumps(s) + "\n").encode() for s in sets))
    except OSError as e:
        raise UserError(f"{args.out}: cannot be written: {e.strerror}") from None
    print(f"{args.out}: {len(sets)} gene sets")


if __name__ == "__main__":
    run(main)
