# train_shakespeare_char.py with 4 tokens predicted at each position:
# python train_k_ahead.py config/train_shakespeare_char_k_ahead.py

from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char.py').read_text())  # all settings but these

k_ahead = 4
positions = 'greedy'  # the further heads are for decoding: let them learn what it asks of them
out_dir = 'out-shakespeare-char-k-ahead'
wandb_run_name = 'mini-gpt-k-ahead'
