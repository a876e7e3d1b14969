"""Train a GPT_KAhead with train.py's loop and keys, and k_ahead: python train_k_ahead.py config/train_gpt2_k_ahead.py"""

from configurator import run
from model_k_ahead import GPT_KAhead
from train import main

if __name__ == '__main__':
    run(lambda: main(GPT_KAhead, out_dir='out_k_ahead'))
