"""DEFT: p to a power that is large where the model is certain. arXiv 2602.11424.

    w_t = p_t^a,   a = sum_v p_v^2 at token t              s_b = 1, average over tokens

Where the model is certain of something (a near 1) it is DFT; where it is not (a near 0), SFT.

Source: the authors' code (luludus/DEFT, main_verl/trainer/fsdp_sft_trainer.py at bbe7896). Its loss is (1 - p^a) /
(a + 1e-6) with a detached, a gradient through p, and so a / (a + 1e-6) p^a for a weight; we leave the 1e-6 out. It
divides by the response tokens of a micro-batch, and adds micro-batches up, as that of variants/power.py.
"""

import bft


def power_of_certainty(tokens):
    return (tokens.extra["collision"] * tokens.logp).exp()                # (N,)


bft.OBJECTIVES["deft"] = bft.Objective(power_of_certainty, bft.every_sample_1, "tokens", needs=("collision",))


if __name__ == "__main__":
    print(bft.worked_example(["deft"]))
