"""
Train a GPT_KAhead: train.py with its loop and its keys, and k_ahead, how many tokens each position
predicts, with the keys of its heads.

    python train_k_ahead.py config/train_shakespeare_char_k_ahead.py --k_ahead=4

It needs prepared data, such as that of data/shakespeare_char/prepare.py.
"""

from configurator import run

from model_k_ahead import GPT_KAhead
from train import main

if __name__ == '__main__':
    run(lambda: main(GPT_KAhead, out_dir='out_k_ahead'))
