# train_gpt2.py with 4 tokens predicted at each position:
# torchrun --standalone --nproc_per_node=8 train_k_ahead.py config/train_gpt2_k_ahead.py

from pathlib import Path

exec(Path(__file__).with_name('train_gpt2.py').read_text())  # all settings but these

k_ahead = 4
out_dir = 'out-gpt2-k-ahead'
wandb_run_name = 'gpt2-k-ahead-124M'
