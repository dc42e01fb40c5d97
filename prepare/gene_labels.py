"""Properties of human genes from the Gene Ontology, as `eval.py --tasks profile --labels` reads them.

    python prepare/gene_labels.py --obo go.obo.gz --gaf goa_human.gaf.gz --out DIR

The inputs are the ontology (OBO) and its human annotations (GAF 2.1 or 2.2) as published at geneontology.org (CC BY
4.0), plain or .gz. A file for each property, a line for each gene: {"gene": symbol, "label": 1 or 0}. 1 has a gene
that is annotated, with any evidence, with the property's term or one below it (by is_a and part_of); 0 a gene of which
something else of the same aspect is known, be it only that it binds a protein. In neither are genes of whose aspect
nothing is known but its root, and those that are both annotated with the property and denied it (NOT).
`colocalizes_with` and `contributes_to` count as annotations. A 0 may still be a 1 that nobody has found yet.

Labels come from annotations alone: no text that a model is shown has a part in them.
"""

import json
import sys
from pathlib import Path

from go_facts import Ontology


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))              # our modules are in the root
from runtime.files import write_whole  # noqa: E402
from runtime.process import Parser, UserError, run  # noqa: E402


# property: (its term, its aspect)
PROPERTIES = {
    "membrane": ("GO:0016020", "cellular_component"),
    "nucleus": ("GO:0005634", "cellular_component"),
    "transcription_factor": ("GO:0003700", "molecular_function"),         # DNA-binding transcription factor activity
}


def gene_labels(onto, term, aspect):
    """{gene: 0 or 1} of an Ontology."""
    known = {t for t, x in onto.terms.items() if x["namespace"] == aspect and x["name"] != aspect}
    return {gene: int(term in have) for gene, have in sorted(onto.annotated.items())
            if have & known and not (term in have and onto.denied[gene] & onto.ancestors(term))}


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--obo", type=Path, required=True, help="the ontology")
    parser.add_argument("--gaf", type=Path, required=True, help="its annotations of human genes")
    parser.add_argument("--out", type=Path, required=True, help="the directory for a file of each property")
    args = parser.parse_args()
    for path in (args.obo, args.gaf):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    try:
        onto = Ontology(args.obo, args.gaf)
    except (EOFError, UnicodeDecodeError) as e:
        raise UserError(f"{args.obo} or {args.gaf} is damaged: {e}; expected both as published") from None
    if lacking := [f"{term} ({name})" for name, (term, _) in PROPERTIES.items() if term not in onto.terms]:
        raise UserError(f"{args.obo}: no term {lacking[0]}; expected the Gene Ontology")
    found = {name: gene_labels(onto, *pair) for name, pair in PROPERTIES.items()}
    if not any(found.values()):
        raise UserError(f"{args.gaf}: no annotation of a gene with a term of {args.obo}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, labels in found.items():
            file = args.out / f"{name}.jsonl"
            write_whole(file, ((json.dumps({"gene": gene, "label": y}) + "\n").encode() for gene, y in labels.items()))
            print(f"{file}: {len(labels)} genes, {sum(labels.values())} with label 1")
    except OSError as e:
        raise UserError(f"{args.out}: cannot be written: {e.strerror}") from None


if __name__ == "__main__":
    run(main)
