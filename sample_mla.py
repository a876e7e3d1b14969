"""
Sample from a GPT_MLA: sample.py, which looks for ckpt_mla.pt, in out_mla where no model is named.

    python sample_mla.py out_mla --start="ROMEO:" --num_samples=3

It needs a checkpoint of train_mla.py or convert_mla.py.
"""

from configurator import run

from sample import main

if __name__ == '__main__':
    run(lambda: main('mla', out_dir='out_mla'))
