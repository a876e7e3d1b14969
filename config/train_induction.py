# Two layers of attention alone learn to copy what came before: python data/induction/prepare.py,
# then train.py or train_mla.py with this file. An induction head forms within some 2,000 iterations
# of the models that form one, in about a minute on one core of a CPU.

out_dir = 'out_induction'
dataset = 'induction'
n_layer = 2
n_head = 4
n_embd = 64
block_size = 32
mlp = False
rotary = 'all'
rotary_base = 1000.0

batch_size = 32
gradient_accumulation_steps = 1
learning_rate = 3e-3
lr_schedule = 'constant'
warmup_iters = 100
beta2 = 0.99
max_iters = 3000
eval_interval = 100
eval_iters = 10
log_interval = 100
always_save_checkpoint = True
keep_checkpoints = 100
