"""Only tokens that the model already expects. arXiv 2510.00526.

    only-top       w_t = 1[p_t >= q]                       s_b = 1, average over tokens
    only-top-p     w_t = p_t 1[p_t >= q]

Source: the authors' code (GaotangLi/Beyond-Log-Likelihood, main_verl/trainer/fsdp_sft_trainer.py at 220589d:
OnlyTopLogP, OnlyTopP). q is a constant of the run, the p_t that it is compared with that of the model in training.
Their scripts take q from percentiles of p on one training set (Qwen2.5-Math-1.5B, NuminaMath): 0.1754 is the tenth,
ours too. The second one's loss is 1 - p, whose gradient is that of p_t l_t.

Where it differs: the code divides by the tokens that are left; ours by all. A step is then as much smaller as there
are fewer, and a batch does not push harder because it has less to learn from.
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
