# train_shakespeare_char.py with rotary positions in place of learned ones:
# python train.py config/train_shakespeare_char_rotary.py

from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char.py').read_text())  # all settings but these

rotary = 'all'
rotary_base = 1000.0  # the context is short
out_dir = 'out-shakespeare-char-rotary'
wandb_run_name = 'mini-gpt-rotary'
