# train_gpt2.py with the attention and the MLP of DeepSeek-V3, dense, in the size of GPT-2 (124M)
# and with the cache of train_gpt2_mla.py. export_huggingface.py writes the model whole:
# torchrun --standalone --nproc_per_node=8 train_mla.py config/train_gpt2_mla_deepseek.py

from pathlib import Path

exec(Path(__file__).with_name('train_gpt2.py').read_text())  # all settings but these

rotary = 'decoupled'
n_rotary = 32
n_latent = 384 - 32  # beside the rotary key
latent_norm = True
latent_scale = True
n_query_latent = 384
mlp = 'gated'
bias = False
out_dir = 'out-gpt2-mla-deepseek'
wandb_run_name = 'gpt2-mla-deepseek-124M'
