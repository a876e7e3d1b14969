# train_shakespeare_char_mla.py with rotary positions on whole queries and keys. Decoding rebuilds
# all keys for each token:
# python train_mla.py config/train_shakespeare_char_mla_rotary.py

from pathlib import Path

_base = Path(__file__).with_name('train_shakespeare_char_mla.py')
exec(_base.read_text())  # all settings but these

rotary = 'all'
rotary_base = 1000.0  # the context is short
out_dir = 'out-shakespeare-char-mla-rotary'
wandb_run_name = 'mini-gpt-mla-rotary'
