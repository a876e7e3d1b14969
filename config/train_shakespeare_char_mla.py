# train_shakespeare_char.py with multi-latent attention:
# python train_mla.py config/train_shakespeare_char_mla.py

from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char.py').read_text())  # all settings but these

n_latent = None  # n_embd // 2; train.py, which has no such key, refuses this file
out_dir = 'out-shakespeare-char-mla'
wandb_run_name = 'mini-gpt-mla'
