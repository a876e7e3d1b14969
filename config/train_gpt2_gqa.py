# train_gpt2.py with grouped queries: three heads of keys and values serve twelve of queries (a
# quarter of the cache, as of train_gpt2_mla.py):
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_gqa.py

from pathlib import Path

exec(Path(__file__).with_name('train_gpt2.py').read_text())  # all settings but these

n_kv_head = 3
out_dir = 'out-gpt2-gqa'
wandb_run_name = 'gpt2-gqa-124M'
