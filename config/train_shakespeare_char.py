# A small character-level GPT on Shakespeare: about 3 minutes on a GPU.
# On a laptop's CPU make it smaller: --block_size=64 --batch_size=12 --n_layer=4 --n_head=4
# --n_embd=128 --dropout=0.0 --max_iters=2000 --lr_decay_iters=2000 --eval_iters=20

out_dir = 'out-shakespeare-char'
eval_interval = 250  # often, because it will overfit
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # keep the best one, for the same reason

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks bear more
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # closer to 1 than for GPT-2, because there are few tokens in an iteration
warmup_iters = 100
