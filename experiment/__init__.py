"""The default job, `python train.py`: what each loss learns, its findings and its pictures."""
