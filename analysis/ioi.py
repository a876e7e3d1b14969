"""
Does the model solve indirect-object identification, and by which heads?

    python -m analysis.ioi gpt2
    python -m analysis.ioi out/ckpt_mla.pt --patch_prompts=32

It needs a model trained on GPT-2's tokens, and no text. "When Mary and John went to the store,
John gave a drink to" ends in Mary, the indirect object (IO), not in John, the subject (S). The
task is that of Wang et al. 2023, "Interpretability in the Wild". They patch paths; here a head's
whole output is patched. The prompts come from templates of our own, in both orders of the two
names.

    logit difference      logit(IO) - logit(S) after the prompt, and the share of prompts in which
                          it is above 0
    direct attribution    what each head adds to it on the direct path: the head's output at the
                          last token, through the final norm at its actual scale. The parts of the
                          model add up to the logit difference. A head has its share of the value
                          bias.
    activation patching   corrupted prompts have three other names in place of the two. One head's
                          output, at the positions of one role, is replaced by its output in the
                          clean prompt. How much of the logit difference comes back: 0 none, 1 all
"""

from dataclasses import dataclass
from functools import partial

from configurator import UserError, run

import numpy as np
import torch

from analysis.attribution import attribute
from analysis.plots import Panel, draw_panels, field_maps, symmetric
from analysis.program import AnalysisConfig, main, top_heads
from analysis.record import edit_head, final_stream, record, run_from
from runtime.progress import progress_bar

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
PLACES = (' store', ' station', ' school', ' garden', ' office', ' hospital', ' house', ' park',
          ' restaurant', ' library')
THINGS = (' drink', ' book', ' ring', ' letter', ' ball', ' ticket', ' flower', ' coin', ' gift',
          ' kiss')
NAMES = (
    'Mary John Tom James Sarah Anna Michael David Robert Peter Paul Mark Daniel Kevin Brian Steven '
    'George Edward Henry Alex Emma Laura Rachel Lisa Kate Jane Alice Julia Amy Jennifer Jessica '
    'Amanda Melissa Nicole Rebecca Elizabeth Katherine Christine Andrew Joseph Charles Thomas '
    'Richard William Christopher Matthew Anthony Joshua Kenneth Ryan Jason Justin Scott Brandon '
    'Benjamin Samuel Gregory Patrick Jack Tyler Aaron Nathan Adam Kyle Carl Arthur Sean Christian '
    'Simon Max Luke Lucy Kelly Maria Sara Victoria Lauren Emily Hannah Martha Alan Roy Louis '
    'Philip Dean Ian Frank Fred Bruce Neil Craig Stephen Martin').split()
LEAST_GAP = 0.05  # nats: shares of a smaller difference mean nothing
ROLES = ('IO', 'S1', 'S1+1', 'S2', 'END', 'others')


@dataclass
class Config(AnalysisConfig):
    prompts: int = 128  # half of them in either order
    patch_prompts: int = 8  # of these, those whose activations are patched, which takes most of
        # the time; 0: none
    top: int = 5  # heads in each part of the table
    least = dict(prompts=2, patch_prompts=0, top=1)


@dataclass
class IOI:
    logit_difference: float  # mean over prompts, in nats
    spread: float  # standard deviation over prompts
    share: float  # of the prompts in which IO is likelier than S
    attribution: np.ndarray  # (n_layer, n_head) of each head to the logit difference, mean
    mlp_attribution: np.ndarray  # (n_layer,)
    rest: float  # of embeddings and biases; all attributions add up to logit_difference
    corrupted: float  # logit difference of the corrupted prompts that are patched; nan if none
    clean: float  # and of the same prompts with their own names
    restored: np.ndarray  # (n_layer, n_head, role) share of clean - corrupted; nan below LEAST_GAP
    roles: tuple
    top: int


@dataclass
class Prompts:
    """IOI prompts, padded at the right with tokens that no earlier one sees."""
    idx: torch.Tensor  # (B, T)
    io: torch.Tensor  # (B,) the ids of the two names
    s: torch.Tensor
    end: torch.Tensor  # (B,) the position of the last token
    roles: torch.Tensor  # (role, B, T) whether a position has a role

    def first(self, count):
        """The first count prompts, half of them in either order. All of them where there are no
        more."""
        count, half = min(count, len(self.idx)), (len(self.idx) + 1) // 2
        keep = [*range((count + 1) // 2), *range(half, half + count // 2)]
        return Prompts(self.idx[keep], self.io[keep], self.s[keep], self.end[keep],
                       self.roles[:, keep])


def single_token_names(tokenizer):
    """The ids of the names that are one token with the space before them."""
    encoded = [tokenizer.encode(f' {name}') for name in NAMES]
    return [ids[0] for ids in encoded if len(ids) == 1]


def make_rows(tokenizer, count, seed):
    """Token ids of count prompts, lists of different length: (clean, corrupted, IO, S) of each."""
    rng = np.random.default_rng(seed)
    names, half = single_token_names(tokenizer), (count + 1) // 2
    rows = []
    for i in range(count):
        io, s, *others = (int(name) for name in rng.choice(names, 5, replace=False))
        first_two = (io, s) if i < half else (s, io)
        template = TEMPLATES[i % half % len(TEMPLATES)]  # the same ones in both orders
        text = template.format(A='\0', B='\0', place=rng.choice(PLACES), thing=rng.choice(THINGS))
        # before, between and behind the three names
        parts = [tokenizer.encode(part) for part in text.split('\0')]
        clean, corrupted = list(parts[0]), list(parts[0])
        for name, other, part in zip((*first_two, s), others, parts[1:]):
            clean += [name, *part]
            corrupted += [other, *part]
        rows.append((clean, corrupted, io, s))
    return rows


def make_prompts(subject, count, seed):
    """count Prompts, and the same with other names in place of all three. In the first half IO
    comes first. Raises UserError for a model whose tokens are not GPT-2's, or whose context is too
    short."""
    if subject.tokenizer.spec != 'gpt2':
        raise UserError("ioi needs names that are one token, as in GPT-2's vocabulary, and "
                        f'{subject.source} has {subject.tokenizer.name}: give a model trained on '
                        'GPT-2 tokens')
    cleans, corrupteds, io, s = zip(*make_rows(subject.tokenizer, count, seed))
    length, block_size = max(map(len, cleans)), subject.model.config.block_size
    if length > block_size:
        raise UserError(f'ioi has prompts of {length} tokens, which do not fit into '
                        f'block_size={block_size}: take a model with a longer context')

    def padded(rows):
        rows = [row + [row[-1]] * (length - len(row)) for row in rows]
        return torch.tensor(rows, device=subject.device)
    end = [len(row) - 1 for row in cleans]
    io, s, end = (torch.tensor(ids, device=subject.device) for ids in (io, s, end))
    clean = padded(cleans)
    roles = find_roles(clean, io, s, end)
    return Prompts(clean, io, s, end, roles), Prompts(padded(corrupteds), io, s, end, roles)


def find_roles(idx, io, s, end):
    """Which positions of the prompts idx (B, T) have which role: (role, B, T)."""
    position = torch.arange(idx.size(1), device=idx.device)
    is_s = idx == s[:, None]
    s1 = is_s & (is_s.cumsum(1) == 1)
    named = [idx == io[:, None], s1, s1.roll(1, dims=1), is_s & ~s1, position == end[:, None]]
    others = (position <= end[:, None]) & ~torch.stack(named).any(0)
    return torch.stack([*named, others])


def at_end(x, prompts):
    """x (B, T, ...) at the last token of each prompt."""
    return x[torch.arange(len(x), device=x.device), prompts.end]


def towards_io(model, prompts):
    """The direction (B, n_embd) whose product with the normed residual stream is
    logit(IO) - logit(S)."""
    return model.lm_head.weight[prompts.io] - model.lm_head.weight[prompts.s]


@torch.no_grad()
def logit_differences(model, x, prompts):
    """logit(IO) - logit(S) for the final residual stream x (B, T, n_embd): (B,)"""
    return (model.transformer.ln_f(at_end(x, prompts)) * towards_io(model, prompts)).sum(-1)


@torch.no_grad()
def patch(model, clean, corrupted):
    """Logit differences (n_layer, n_head, role, B) of the corrupted prompts with the output of one
    head, at the positions of one role, as it is in the clean prompts. Then the logit differences
    of the clean and of the corrupted prompts without patching, (B,) each."""
    clean_z = []
    for block in record(model, clean.idx):
        clean_z.append(block.z)
    before = logit_differences(model, block.after, clean)
    corrupted_run = list(record(model, corrupted.idx))
    after = logit_differences(model, corrupted_run[-1].after, corrupted)
    n_roles, B, T = clean.roles.shape
    # the prompts once for each role, side by side in one batch
    many = Prompts(clean.idx.repeat(n_roles, 1), *(ids.repeat(n_roles) for ids in
                                                   (clean.io, clean.s, clean.end)), roles=None)
    where = clean.roles.reshape(n_roles * B, T, 1)
    results = torch.empty(len(clean_z), clean_z[0].size(1), n_roles, B)
    for layer, head in progress_bar(list(np.ndindex(results.shape[:2])), 'patching'):
        restored = clean_z[layer][:, head].repeat(n_roles, 1, 1)
        edit = edit_head(layer, head, partial(torch.where, where, restored))
        entering = corrupted_run[layer].before.repeat(n_roles, 1, 1)
        x = final_stream(run_from(model, entering, layer, edit))
        results[layer, head] = logit_differences(model, x, many).view(n_roles, B)
    return results, before, after


def analyse(subject, config):
    clean, corrupted = make_prompts(subject, config.prompts, config.seed)
    parts = attribute(subject.model, clean.idx, clean.end, towards_io(subject.model, clean))
    restored = np.full((*parts.heads.shape[:2], len(ROLES)), np.nan)
    before = after = np.nan
    if config.patch_prompts:
        count = config.patch_prompts
        patched, *ends = patch(subject.model, clean.first(count), corrupted.first(count))
        before, after = (end.mean().item() for end in ends)
        if abs(before - after) >= LEAST_GAP:
            restored = (patched.mean(-1).double().numpy() - after) / (before - after)
    return IOI(
        logit_difference=parts.total.mean().item(), spread=parts.total.std().item(),
        share=(parts.total > 0).double().mean().item(),
        attribution=parts.heads.mean(-1).cpu().numpy(),
        mlp_attribution=parts.mlps.mean(-1).cpu().numpy(),
        rest=(parts.embedding + parts.positions + parts.biases).mean().item(), corrupted=after,
        clean=before, restored=restored, roles=ROLES, top=config.top)


def table(result):
    lines = [f'logit difference IO - S {result.logit_difference:.2f} +- {result.spread:.2f} nats, '
             f'IO preferred in {result.share:.1%} of the prompts', '', 'direct attribution (nats)']
    for layer, head in top_heads(abs(result.attribution), result.top):
        lines.append(f'{f"{layer}.{head}":>8}{result.attribution[layer, head]:>+9.3f}')
    lines.append(f'   all heads {result.attribution.sum():+.3f}, '
                 f'MLPs {result.mlp_attribution.sum():+.3f}, '
                 f'embedding and biases {result.rest:+.3f}')
    if np.isfinite(result.restored).any():
        lines += ['', f'patching: restored of the way from {result.corrupted:.2f} to '
                      f'{result.clean:.2f} nats']
        order = np.argsort(-abs(result.restored), axis=None, kind='stable')[:result.top]
        for layer, head, role in zip(*np.unravel_index(order, result.restored.shape)):
            lines.append(f'{f"{layer}.{head}":>8} at {result.roles[role]:<7}'
                         f'{result.restored[layer, head, role]:>+7.1%}')
    elif np.isfinite(result.clean):
        lines += ['', f'patching: other names change {result.clean:.2f} to '
                      f'{result.corrupted:.2f} nats, too little to restore']
    return '\n'.join(lines)


def plot(results):
    attribution = field_maps(results, 'attribution')
    end = symmetric(attribution)
    panels = [Panel('direct logit attribution', attribution, 'nats', -end, end, 'RdBu_r')]
    restored = field_maps(results, 'restored')
    end = symmetric(restored)
    for number, role in enumerate(ROLES):
        maps = {name: shares[:, :, number] for name, shares in restored.items()}
        if any(np.isfinite(shares).any() for shares in maps.values()):
            panels.append(Panel(f'patched at {role}', maps, 'share restored', -end, end, 'RdBu_r'))
    title = ', '.join(f'{name}: {result.logit_difference:.2f} nats, IO in {result.share:.0%}'
                      for name, result in results.items())
    return draw_panels(f'Indirect-object identification. {title}', panels)


if __name__ == '__main__':
    run(lambda: main('ioi', Config, analyse, table, plot))
