# Evaluate the published weights of gpt2-medium on a dataset
# (24 layers, 16 heads, 1024 wide: 350M parameters).

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
wandb_log = False
