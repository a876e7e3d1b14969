# Evaluate the published weights of gpt2-large on a dataset
# (36 layers, 20 heads, 1280 wide: 774M parameters).

init_from = 'gpt2-large'
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
wandb_log = False
