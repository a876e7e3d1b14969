# train_gpt2.py with multi-latent attention, in the size of GPT-2 (124M):
# torchrun --standalone --nproc_per_node=8 train_mla.py config/train_gpt2_mla.py

from pathlib import Path

exec(Path(__file__).with_name('train_gpt2.py').read_text())  # all settings but these

n_latent = None  # n_embd // 2; train.py, which has no such key, refuses this file
out_dir = 'out-gpt2-mla'
wandb_run_name = 'gpt2-mla-124M'
