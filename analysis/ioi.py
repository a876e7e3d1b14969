"""
Does the model solve indirect-object identification, and by which heads?

"When Mary and John went to the store, John gave a drink to" ends in Mary, the indirect object (IO), not in John, the
subject (S). The task is that of Wang et al. 2023, "Interpretability in the Wild", who patch paths where here a head's whole
output is patched. Prompts come from templates of our own, in both orders of the two names.

    logit difference      logit(IO) - logit(S) after the prompt; share of prompts in which it is above 0
    direct attribution    what each head adds to it on the direct path: what it writes at the last token (its share of the
                          value bias included), through the final norm with the scale that it has; all parts of the model add
                          up to the logit difference
    activation patching   the same prompts with three other names (corrupted) in place of the two; one head's output, at the
                          positions of one role, is set to what it is in the clean prompt. How much of the logit difference
                          comes back: 0 none, 1 all of it
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis.plots import Panel, draw_panels, symmetric
from analysis.program import AnalysisConfig, main, progress, top_heads
from analysis.record import go_on, last, record
from configurator import UserError, check_least, run

TEMPLATES = (
    'When{A} and{B} walked to the{place},{B} gave a{thing} to',
    'Then,{A} and{B} met at the{place}.{B} handed a{thing} to',
    'After{A} and{B} arrived at the{place},{B} offered a{thing} to',
    'Yesterday{A} and{B} had lunch at the{place}, and{B} passed a{thing} to',
    'While{A} and{B} were waiting at the{place},{B} showed a{thing} to',
    'The day before,{A} and{B} went to the{place}. Later{B} brought a{thing} to',
    'Since{A} and{B} worked at the{place},{B} decided to give a{thing} to',
    'Friends since school,{A} and{B} often visited the{place}. Once{B} gave a{thing} to',
)
PLACES = (' store', ' station', ' school', ' garden', ' office', ' hospital', ' house', ' park', ' restaurant', ' library')
THINGS = (' drink', ' book', ' ring', ' letter', ' ball', ' ticket', ' flower', ' coin', ' gift', ' kiss')
NAMES = ('Mary John Tom James Sarah Anna Michael David Robert Peter Paul Mark Daniel Kevin Brian Steven George Edward Henry '
         'Alex Emma Laura Rachel Lisa Kate Jane Alice Julia Amy Jennifer Jessica Amanda Melissa Nicole Rebecca Elizabeth '
         'Katherine Christine Andrew Joseph Charles Thomas Richard William Christopher Matthew Anthony Joshua Kenneth Ryan '
         'Jason Justin Scott Brandon Benjamin Samuel Gregory Patrick Jack Tyler Aaron Nathan Adam Kyle Carl Arthur Sean '
         'Christian Simon Max Luke Lucy Kelly Maria Sara Victoria Lauren Emily Hannah Martha Alan Roy Louis Philip Dean '
         'Ian Frank Fred Bruce Neil Craig Stephen Martin').split()
LEAST_GAP = 0.05  # nats: less is no difference of which shares could be restored
ROLES = ('IO', 'S1', 'S1+1', 'S2', 'END', 'others')


@dataclass
class Config(AnalysisConfig):
    prompts: int = 128  # half of them in either order
    patch_prompts: int = 8  # of these, those whose activations are patched, which takes most of the time; 0: none
    top: int = 5  # heads in each part of the table

    def __post_init__(self):
        super().__post_init__()
        check_least(self, prompts=2, patch_prompts=0, top=1)


@dataclass
class IOI:
    logit_difference: float  # mean over prompts, in nats
    spread: float  # standard deviation over prompts
    share: float  # of the prompts in which IO is likelier than S
    attribution: np.ndarray  # (n_layer, n_head) of each head to the logit difference, mean over prompts
    mlp_attribution: np.ndarray  # (n_layer,)
    rest: float  # of embeddings and biases; all attributions add up to logit_difference
    corrupted: float  # logit difference of the corrupted prompts that are patched; nan if none were
    clean: float  # and of the same with their own names
    restored: np.ndarray  # (n_layer, n_head, role) of the difference between the two; nan where that is below LEAST_GAP
    roles: tuple
    top: int


@dataclass
class Prompts:
    """IOI prompts, filled up at the right with tokens that no earlier one sees."""
    idx: torch.Tensor  # (B, T)
    io: torch.Tensor  # (B,) the ids of the two names
    s: torch.Tensor
    end: torch.Tensor  # (B,) the position of the last token
    roles: torch.Tensor  # (role, B, T) where each role stands

    def first(self, count):
        """The first count prompts, half of them in either order; all of them where there are no more."""
        count, half = min(count, len(self.idx)), (len(self.idx) + 1) // 2
        keep = [*range((count + 1) // 2), *range(half, half + count // 2)]
        return Prompts(self.idx[keep], self.io[keep], self.s[keep], self.end[keep], self.roles[:, keep])


def single_token_names(tokenizer):
    """The ids of the names that are one token with the space before them."""
    encoded = [tokenizer.encode(f' {name}') for name in NAMES]
    return [ids[0] for ids in encoded if len(ids) == 1]


def make_prompts(subject, count, seed):
    """count Prompts and the same with all names replaced by others. In the first half IO comes first. Raises UserError for
    a model whose tokens are not GPT-2's, or whose context is too short."""
    if subject.spec != 'gpt2':
        raise UserError(f'ioi needs names that are one token, as in GPT-2\'s vocabulary, and {subject.source} reads characters: '
                        'give a model trained on GPT-2 tokens')
    tokenizer, rng = subject.tokenizer, np.random.default_rng(seed)
    names = single_token_names(tokenizer)
    rows = []
    for i in range(count):
        number = i if i < (count + 1) // 2 else i - (count + 1) // 2  # the same templates in both orders
        io, s, *others = (int(name) for name in rng.choice(names, 5, replace=False))
        template, place, thing = TEMPLATES[number % len(TEMPLATES)], rng.choice(PLACES), rng.choice(THINGS)
        first_two = (io, s) if i < (count + 1) // 2 else (s, io)
        text = template.format(A='\0', B='\0', place=place, thing=thing)
        parts = [tokenizer.encode(part) for part in text.split('\0')]  # before, between and behind the three names

        def fill(a, b, c):
            return [*parts[0], a, *parts[1], b, *parts[2], c, *parts[3]]
        rows.append((fill(*first_two, s), fill(*others), io, s))
    length = max(len(clean) for clean, *_ in rows)
    if length > subject.model.config.block_size:
        raise UserError(f'ioi has prompts of {length} tokens, which do not fit into block_size='
                        f'{subject.model.config.block_size}: take a model with a longer context')
    clean, corrupted = (torch.tensor([row[which] + [row[which][-1]] * (length - len(row[which])) for row in rows],
                                     device=subject.device) for which in (0, 1))
    io, s = (torch.tensor([row[which] for row in rows], device=subject.device) for which in (2, 3))
    end = torch.tensor([len(row[0]) - 1 for row in rows], device=subject.device)
    position = torch.arange(length, device=subject.device)
    is_s = clean == s[:, None]
    s1 = is_s & (is_s.cumsum(1) == 1)
    named = [clean == io[:, None], s1, s1.roll(1, dims=1), is_s & ~s1, position == end[:, None]]
    others = (position <= end[:, None]) & ~torch.stack(named).any(0)
    roles = torch.stack([*named, others])
    return Prompts(clean, io, s, end, roles), Prompts(corrupted, io, s, end, roles)


def at_end(x, prompts):
    """x (B, T, ...) at the last token of each prompt."""
    return x[torch.arange(len(x), device=x.device), prompts.end]


def towards_io(model, prompts):
    """What of the normed residual stream makes logit(IO) - logit(S): (B, n_embd)"""
    return model.lm_head.weight[prompts.io] - model.lm_head.weight[prompts.s]


@torch.no_grad()
def logit_differences(model, x, prompts):
    """logit(IO) - logit(S) for the last residual stream x (B, T, n_embd): (B,)"""
    return (model.transformer.ln_f(at_end(x, prompts)) * towards_io(model, prompts)).sum(-1)


@torch.no_grad()
def attribute(model, prompts):
    """The part of each head (n_layer, n_head, B), of each MLP (n_layer, B) and of the rest (B,) in the logit difference
    (B,), which comes last."""
    ln_f = model.transformer.ln_f
    direction = towards_io(model, prompts).double()
    blocks, written = model.transformer.h, []
    for block in record(model, prompts.idx):
        W_O = blocks[block.layer].attn.head_weights()[-1]  # (n_head, head_dim, n_embd)
        z = at_end(block.z.transpose(1, 2), prompts)  # (B, n_head, head_dim)
        heads = torch.einsum('bhd,hdn->hbn', z.double(), W_O.double())  # (n_head, B, n_embd)
        if block.layer == 0:
            rest = at_end(block.before, prompts).double()
        bias = blocks[block.layer].attn.c_proj.bias
        rest = rest if bias is None else rest + bias.double()
        written.append((heads, at_end(block.mlp_out, prompts).double()))
    x = at_end(block.after, prompts).double()
    std = (x.var(-1, correction=0) + 1e-5).sqrt()  # (B,)
    reads = direction * ln_f.weight.double()
    reads = (reads - reads.mean(-1, keepdim=True)) / std[:, None]  # (B, n_embd): the norm takes the mean away
    bias = 0.0 if ln_f.bias is None else (direction * ln_f.bias.double()).sum(-1)
    heads = torch.stack([(part * reads).sum(-1) for part, _ in written])
    mlps = torch.stack([(part * reads).sum(-1) for _, part in written])
    return heads, mlps, (rest * reads).sum(-1) + bias, (x * reads).sum(-1) + bias


@torch.no_grad()
def patch(model, clean, corrupted):
    """Logit differences (n_layer, n_head, role, B) of the corrupted prompts, with the output of one head at the positions
    of one role as it is in the clean ones; and those of both without patching, (B,) each."""
    clean_z = []
    for block in record(model, clean.idx):
        clean_z.append(block.z)
    before = logit_differences(model, block.after, clean)
    corrupted_run = list(record(model, corrupted.idx))
    after = logit_differences(model, corrupted_run[-1].after, corrupted)
    n_roles, B, T = clean.roles.shape
    many = Prompts(*(t.repeat(n_roles, *[1] * (t.dim() - 1)) for t in (clean.idx, clean.io, clean.s, clean.end)), roles=None)
    where = clean.roles.reshape(n_roles * B, T, 1)
    results = torch.empty(len(clean_z), clean_z[0].size(1), n_roles, B)
    for layer, head in progress(list(np.ndindex(results.shape[:2])), 'patching'):
        def edit(number, z):
            if number == layer:
                z = z.clone()
                z[:, head] = torch.where(where, clean_z[layer][:, head].repeat(n_roles, 1, 1), z[:, head])
            return z
        x = last(go_on(model, corrupted_run[layer].before.repeat(n_roles, 1, 1), layer, edit))
        results[layer, head] = logit_differences(model, x, many).view(n_roles, B)
    return results, before, after


def analyse(subject, config):
    model = subject.model
    clean, corrupted = make_prompts(subject, config.prompts, config.seed)
    heads, mlps, rest, differences = attribute(model, clean)
    c = model.config
    restored, ends = np.full((c.n_layer, c.n_head, len(ROLES)), np.nan), (np.nan, np.nan)
    if config.patch_prompts:
        patched, *ends = patch(model, clean.first(config.patch_prompts), corrupted.first(config.patch_prompts))
        ends = [end.mean().item() for end in ends]
        if abs(ends[0] - ends[1]) >= LEAST_GAP:
            restored = (patched.mean(-1).double().numpy() - ends[1]) / (ends[0] - ends[1])
    return IOI(differences.mean().item(), differences.std().item(), (differences > 0).double().mean().item(),
               heads.mean(-1).cpu().numpy(), mlps.mean(-1).cpu().numpy(), rest.mean().item(), corrupted=ends[1], clean=ends[0],
               restored=restored, roles=ROLES, top=config.top)


def table(result):
    lines = [f'logit difference IO - S {result.logit_difference:.2f} +- {result.spread:.2f} nats, IO preferred in '
             f'{result.share:.1%} of the prompts', '', 'direct attribution (nats)']
    for layer, head in top_heads(abs(result.attribution), result.top):
        lines.append(f'{f"{layer}.{head}":>8}{result.attribution[layer, head]:>+9.3f}')
    lines.append(f'   all heads {result.attribution.sum():+.3f}, MLPs {result.mlp_attribution.sum():+.3f}, embedding and biases '
                 f'{result.rest:+.3f}')
    if np.isfinite(result.restored).any():
        lines += ['', f'patching: restored of the way from {result.corrupted:.2f} to {result.clean:.2f} nats']
        order = np.argsort(-abs(result.restored), axis=None, kind='stable')[:result.top]
        for layer, head, role in zip(*np.unravel_index(order, result.restored.shape)):
            lines.append(f'{f"{layer}.{head}":>8} at {result.roles[role]:<7}{result.restored[layer, head, role]:>+7.1%}')
    elif np.isfinite(result.clean):
        lines += ['', f'patching: other names change {result.clean:.2f} to {result.corrupted:.2f} nats, too little to restore']
    return '\n'.join(lines)


def plot(results):
    attribution = {name: result.attribution for name, result in results.items()}
    end = symmetric(attribution)
    panels = [Panel('direct logit attribution', attribution, 'nats', -end, end, 'RdBu_r')]
    for role in range(len(ROLES)):
        restored = {name: result.restored[:, :, role] for name, result in results.items()}
        if any(np.isfinite(shares).any() for shares in restored.values()):
            end = symmetric({name: result.restored for name, result in results.items()})
            panels.append(Panel(f'patched at {ROLES[role]}', restored, 'share restored', -end, end, 'RdBu_r'))
    title = ', '.join(f'{name}: {result.logit_difference:.2f} nats, IO in {result.share:.0%}' for name, result in results.items())
    return draw_panels(f'Indirect-object identification. {title}', panels)


if __name__ == '__main__':
    run(lambda: main('ioi', Config, analyse, table, plot))
