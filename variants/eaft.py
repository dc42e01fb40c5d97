"""EAFT: tokens where the model hesitates, whatever the target is. arXiv 2601.02151.

    w_t = H_20 / 3                                         s_b = 1, average over tokens

H_20 is the entropy, in nats, of the 20 likeliest tokens, renormalised; 3 stands for its largest value, log 20 =
2.996.

Source: LLaMA-Factory (src/llamafactory/train/trainer_utils.py, PR 9720 by the authors), with its exponent of 1; the
equations are 2 and 3 of the paper. Axolotl (PR 3366) leaves out the 3, so that its steps are three times as long.
Both divide by the response tokens of the step, as we do.
"""

import bft


def hesitation(tokens):
    return tokens.extra["top20_entropy"] / 3                              # (N,)


bft.OBJECTIVES["eaft"] = bft.Objective(hesitation, bft.every_sample_1, "tokens", needs=("top20_entropy",))


if __name__ == "__main__":
    print(bft.worked_example(["eaft"]))
