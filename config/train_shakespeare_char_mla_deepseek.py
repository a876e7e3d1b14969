# train_shakespeare_char_mla_decoupled.py with all that DeepSeek-V3 has and a dense model needs. It
# exports whole, as a DeepseekV3ForCausalLM with dense MLPs:
# python train_mla.py config/train_shakespeare_char_mla_deepseek.py

from pathlib import Path

_base = Path(__file__).with_name('train_shakespeare_char_mla_decoupled.py')
exec(_base.read_text())  # all settings but these

latent_norm = True
latent_scale = True
n_query_latent = 192
mlp = 'gated'
bias = False
out_dir = 'out-shakespeare-char-mla-deepseek'
wandb_run_name = 'mini-gpt-mla-deepseek'
