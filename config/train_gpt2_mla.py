# train_gpt2.py with multi-latent attention, in the size of GPT-2 (124M):
# torchrun --standalone --nproc_per_node=8 train_mla.py config/train_gpt2_mla.py

exec(open(__file__.replace('_mla.py', '.py')).read())  # every setting the same but for these

out_dir = 'out-gpt2-mla'
wandb_run_name = 'gpt2-mla-124M'
n_latent = 384  # half of n_embd: a cache of a quarter of MHA's
