"""Train a GPT_MLA with train.py's loop and keys, and n_latent: python train_mla.py config/train_gpt2_mla.py"""

from configurator import run
from model_mla import GPT_MLA
from train import main

if __name__ == '__main__':
    run(lambda: main(GPT_MLA, out_dir='out_mla'))
