# train_shakespeare_char.py without MLPs, as in the circuits literature, with rotary positions:
# python train.py config/train_shakespeare_char_attention_only.py --n_layer=2

from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char.py').read_text())  # all settings but these

mlp = False
rotary = 'all'
rotary_base = 1000.0  # the context is short
out_dir = 'out-shakespeare-char-attention-only'
wandb_run_name = 'mini-gpt-attention-only'
