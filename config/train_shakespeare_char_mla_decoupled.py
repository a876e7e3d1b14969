# train_shakespeare_char_mla.py with DeepSeek's decoupled rotary key, in a cache of the same size:
# python train_mla.py config/train_shakespeare_char_mla_decoupled.py

from pathlib import Path

_base = Path(__file__).with_name('train_shakespeare_char_mla.py')
exec(_base.read_text())  # all settings but these

rotary = 'decoupled'
rotary_base = 1000.0  # the context is short
n_rotary = 32
n_latent = 192 - 32  # beside the rotary key
out_dir = 'out-shakespeare-char-mla-decoupled'
wandb_run_name = 'mini-gpt-mla-decoupled'
