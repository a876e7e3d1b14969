# GPT-2 (124M) on OpenWebText, down to a loss of about 2.85 in 4 to 5 days on one node of 8 A100
# (nanoGPT's figure):
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens per iteration, on any number of
# GPUs that divides 40
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens in all
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
