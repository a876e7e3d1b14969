"""The learning rate in the course of a run, and settings of it that contradict each other."""

import math

COOLDOWN = 0.2  # the share of a wsd run in which the rate falls
FAR = 0.25  # lr_decay_iters this far from max_iters, as a share of it, is worth a note


def learning_rate_at(iter_num, config):
    """Linear warm-up to learning_rate, then by lr_schedule down to min_lr at lr_decay_iters, then
    min_lr. 'constant' stays at learning_rate.

    'wsd' (warm-up, stable, decay) stays there too until the last COOLDOWN of the iterations up to
    lr_decay_iters. There it falls as 1 - sqrt (Haegele et al. 2024, "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations", section 3).
    """
    if not config.decay_lr:
        return config.learning_rate
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == 'constant':
        return config.learning_rate
    if iter_num >= config.lr_decay_iters:
        return config.min_lr
    start = config.warmup_iters
    if config.lr_schedule == 'wsd':
        start = max(start, config.lr_decay_iters * (1 - COOLDOWN))
    ratio = max(0, iter_num - start) / (config.lr_decay_iters - start)
    falls = {'cosine': 0.5 * (1 + math.cos(math.pi * ratio)), 'linear': 1 - ratio,
             'wsd': 1 - math.sqrt(ratio)}
    return config.min_lr + falls[config.lr_schedule] * (config.learning_rate - config.min_lr)


def contradictions(config, model_config):
    """A line for each pair of settings that hardly both are meant."""
    c, lines = config, []
    n_embd, widest = model_config.n_embd, getattr(model_config, 'n_latent', None) or 0
    n_latent = max(widest) if isinstance(widest, tuple) else widest
    if n_latent > n_embd:
        against = 'larger than' if n_latent > 2 * n_embd else 'as large as' if (
            n_latent == 2 * n_embd) else 'smaller than'
        lines.append(f'n_latent={n_latent} is above n_embd={n_embd}: keys and values have at most '
                     f'n_embd directions, and the cache of {n_latent} numbers per token and layer '
                     f"is {against} MHA's of {2 * n_embd}")
    if model_config.rotary == 'none' and model_config.rotary_base != type(model_config).rotary_base:
        lines.append(f'rotary_base={model_config.rotary_base:g} does nothing, since rotary is '
                     "'none': --rotary=all would use it")
    if c.eval_only or not c.max_iters or not c.decay_lr:
        return lines
    if c.warmup_iters >= c.max_iters:
        lines.append(f'warmup_iters={c.warmup_iters} is not below max_iters={c.max_iters}: the run '
                     'never leaves warm-up, and its highest learning rate is '
                     f'{learning_rate_at(c.max_iters - 1, c):.3g}; {remedy(c)}')
    if c.lr_schedule == 'constant':
        return lines
    if c.min_lr > c.learning_rate:
        lines.append(f'min_lr={c.min_lr} is above learning_rate={c.learning_rate}: the rate rises '
                     'to it after warm-up; give a min_lr of about learning_rate / 10')
    last = learning_rate_at(c.max_iters - 1, c)
    if c.lr_decay_iters > (1 + FAR) * c.max_iters and c.warmup_iters < c.max_iters:
        lines.append(f'lr_decay_iters={c.lr_decay_iters} is far above max_iters={c.max_iters}: the '
                     f'learning rate ends at {last:.3g} and not at min_lr={c.min_lr}; {remedy(c)}')
    if c.lr_decay_iters < (1 - FAR) * c.max_iters:
        lines.append(f'lr_decay_iters={c.lr_decay_iters} is far below max_iters={c.max_iters}: '
                     f'from there on the learning rate is min_lr={c.min_lr}; {remedy(c)}')
    return lines


def remedy(config):
    """The schedule that fits max_iters, as options."""
    options = [f'--lr_decay_iters={config.max_iters}']
    if config.warmup_iters > config.max_iters // 10:
        options.append(f'--warmup_iters={max(1, config.max_iters // 20)}')
    return f'{" ".join(options)} would fit'
