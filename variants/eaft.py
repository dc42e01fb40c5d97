"""EAFT: tokens where the model hesitates, whatever the target is. arXiv 2601.02151.

    w_t = H_20 / 3                                         s_b = 1, average over tokens

H_20 is the entropy, in nats, of the 20 likeliest tokens, renormalised; 3 stands for its largest value, log 20 = 2.996.

Source: the paper's equations 2 and 3, and LLaMA-Factory (src/llamafactory/train/trainer_utils.py at 38a6312, PR 9720 by
the authors), with its exponent of 1. Both divide by the response tokens of the step, as we do.

Where it differs: axolotl (PR 3366) leaves out the 3, so that its gradients are three times as large.
"""

import bft


def hesitation(tokens):
    return tokens.extra["top20_entropy"] / 3                              # (N,)


bft.OBJECTIVES["eaft"] = bft.Objective(hesitation, bft.every_sample_1, "tokens", needs=("top20_entropy",))


if __name__ == "__main__":
    print(bft.worked_example(["eaft"]))
