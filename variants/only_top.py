"""Only tokens that the model already expects. arXiv 2510.00526.

    only-top       w_t = 1[p_t >= q]                       s_b = 1, average over tokens
    only-top-p     w_t = p_t 1[p_t >= q]

q is a constant of the run; p_t is that of the model in training. The second one's loss is 1 - p, whose gradient is that
of p_t l_t.

Source: the authors' code (GaotangLi/Beyond-Log-Likelihood, main_verl/trainer/fsdp_sft_trainer.py at 220589d:
OnlyTopLogP, OnlyTopP). Its scripts take q from percentiles of p on one training set (Qwen2.5-Math-1.5B, NuminaMath):
0.1754 is the tenth, and what we use. For another model and data, compute your own.

Where it differs: the code divides by the tokens that are left in a micro-batch, and adds micro-batches up; we divide by
all tokens of the global batch. Our gradient is as much smaller as fewer are left.
"""

import bft


Q = 0.1754


def is_expected(tokens):
    return (tokens.logp.exp() >= Q).double()                              # (N,)


def probability_if_expected(tokens):
    return tokens.logp.exp() * is_expected(tokens)                        # (N,)


bft.OBJECTIVES["only-top"] = bft.Objective(is_expected, bft.every_sample_1, "tokens")
bft.OBJECTIVES["only-top-p"] = bft.Objective(probability_if_expected, bft.every_sample_1, "tokens")


if __name__ == "__main__":
    print(bft.worked_example(["only-top", "only-top-p"]))
