# train_shakespeare_char.py with multi-latent attention: python train_mla.py config/train_shakespeare_char_mla.py

exec(open(__file__.replace('_mla.py', '.py')).read())  # every setting the same but for these

out_dir = 'out-shakespeare-char-mla'
wandb_run_name = 'mini-gpt-mla'
n_latent = 192  # half of n_embd
