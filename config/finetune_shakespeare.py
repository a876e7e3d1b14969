# Finetune GPT-2's weights on Shakespeare (python data/shakespeare/prepare.py first).

import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False  # only when the val loss improves

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per iteration; Shakespeare has about
# 302,000, so an epoch is about 9 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
