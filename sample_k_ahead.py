"""
Sample from a GPT_KAhead with all its heads: sample.py, which looks for ckpt_k_ahead.pt, in
out_k_ahead where no model is named.

    python sample_k_ahead.py out_k_ahead --temperature=0

It needs a checkpoint of train_k_ahead.py.
"""

from configurator import run

from sample import main

if __name__ == '__main__':
    run(lambda: main('k_ahead', out_dir='out_k_ahead'))
