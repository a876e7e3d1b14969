# Evaluate the published weights of gpt2 on a dataset
# (12 layers, 12 heads, 768 wide: 124M parameters).

init_from = 'gpt2'
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
wandb_log = False
