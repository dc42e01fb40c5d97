"""ProFit: tokens below a probability are left out. arXiv 2601.09195.

    w_t = 1[p_t >= 0.1]                                    s_b = 1, average over all response tokens

Source: the authors' code (Utaotao/ProFit, src/llamafactory/train/trainer_utils.py at 92529ff), with the threshold
and the direction ("higher") of its recipe. In training it divides by all response tokens of the step, as we do; in
an evaluation, where that number is not given, by those that are left.

It is our only-top (variants/only_top.py) with another threshold.
"""

import bft


THRESHOLD = 0.1


def is_probable(tokens):
    return (tokens.logp.exp() >= THRESHOLD).double()                      # (N,)


bft.OBJECTIVES["profit"] = bft.Objective(is_probable, bft.every_sample_1, "tokens")


if __name__ == "__main__":
    print(bft.worked_example(["profit"]))
