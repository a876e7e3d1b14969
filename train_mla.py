"""
Train a GPT_MLA: train.py with its loop and its keys, and n_latent, the width of the latent.

    python train_mla.py config/train_shakespeare_char_mla.py --n_latent=64

It needs prepared data, such as that of data/shakespeare_char/prepare.py.
"""

from configurator import run

from model_mla import GPT_MLA
from train import main

if __name__ == '__main__':
    run(lambda: main(GPT_MLA, out_dir='out_mla'))
