# train_shakespeare_char.py with grouped queries: two heads of keys and values serve six of queries
# (a third of the cache):
# python train.py config/train_shakespeare_char_gqa.py

from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char.py').read_text())  # all settings but these

n_kv_head = 2
out_dir = 'out-shakespeare-char-gqa'
wandb_run_name = 'mini-gpt-gqa'
