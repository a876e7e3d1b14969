# Evaluate the published weights of gpt2-xl on a dataset
# (48 layers, 25 heads, 1600 wide: 1558M parameters).

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
wandb_log = False
