# The fastest way to a loss that train_shakespeare_char.py's size for a CPU has after 2,000
# iterations: 380 iterations with rotary positions, Muon and a high learning rate.

from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char_cpu.py').read_text())  # all but these

out_dir = 'out-shakespeare-char-muon'
rotary = 'all'
rotary_base = 1000.0

optimizer = 'muon'
learning_rate = 1.2e-2
min_lr = 0.0
lr_schedule = 'linear'
warmup_iters = 10
max_iters = 380
lr_decay_iters = 380
eval_interval = 380
log_interval = 50
eval_iters = 5  # evaluation is a part of the race
