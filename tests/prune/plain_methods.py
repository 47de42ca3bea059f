"""Every method of one round as plain PyTorch, for test_methods_against_reference.py.

It shares no code with the package: dense products, block sums by index_add, ranking by sorting Python lists.
"""

import copy
import zlib

import torch
import torch.nn.functional as F
from torch import nn

from sparse_pathways.mask import Cubic

LANGUAGES = ("en", "fr")
BLOCK = (4, 1)
STEPS, TARGET, INTERVAL, FREEZE = 40, 0.6, 3, 28
RISE = Cubic(0.0, TARGET, 0, STEPS // 2)


def mlp():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 8)).double()  # 18 rows: an edge block of 2


def make_batches(steps=STEPS, languages=LANGUAGES, seed=7):
    """Unbalanced languages with different targets: "fr" in about one batch of three."""
    draw = torch.Generator().manual_seed(seed)
    truth = {name: torch.randn(8, 12, generator=draw, dtype=torch.float64) for name in LANGUAGES}
    for _ in range(steps):
        name = LANGUAGES[int(torch.rand((), generator=draw) < 0.35)] if len(languages) > 1 else languages[0]
        x = torch.randn(16, 12, generator=draw, dtype=torch.float64)
        yield name, x, x @ truth[name].T


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=2e-2, momentum=0.9, weight_decay=0.01)


def block_index(weight):
    n, k = torch.meshgrid(torch.arange(weight.shape[0]), torch.arange(weight.shape[1]), indexing="ij")
    return (n // BLOCK[0]) * -(-weight.shape[1] // BLOCK[1]) + k // BLOCK[1]


def block_sum(values, index):
    return torch.zeros(int(index.max()) + 1).index_add(0, index.flatten(), values.flatten().float())


def top(scores, candidates, sparsity):
    keep = round((1 - sparsity) * len(scores))
    values = scores.tolist()
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[sorted(candidates, key=lambda i: (-values[i], i))[:keep]] = True
    return mask


def hard_concrete(scores, module, language, batch):
    """Gates of arXiv 1712.01312, equations 10 and 11, of logits 2 above the scores."""
    seed = zlib.crc32(f"{module}/{LANGUAGES.index(language)}/{batch}".encode())
    u = torch.empty_like(scores).uniform_(1e-6, 1 - 1e-6, generator=torch.Generator().manual_seed(seed))
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + scores + 2) / (2 / 3))
    return torch.clamp(s * 1.2 - 0.1, 0, 1)


def reference(
    model,
    batches,
    make_optimizer,
    *,
    shared,
    inside,
    score,
    fixed=None,
    cubic=True,
    masks=None,
    begin=0.0,
    after=False,
    hard=False,
    scale_lr=0.0,
):
    """Train `model` (Linear, Tanh, Linear), yield ([weights], {language: [block masks, flat]}) after every step.

    shared: one mask. inside: variant B (update and candidates inside the mask, moments of lost blocks zeroed).
    fixed: masks that stay. cubic: False: TARGET from the start. masks, begin: those to begin with, and their sparsity.
    after: updates inside the mask once masks are fixed. hard: hard-concrete gates. scale_lr: of a factor per block.
    """
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    index = [block_index(w) for w in weights]
    full = {name: [torch.ones(int(i.max()) + 1, dtype=torch.bool) for i in index] for name in LANGUAGES}
    masks = dict(fixed or masks or full)
    average = {name: [torch.zeros(int(i.max()) + 1) for i in index] for name in LANGUAGES}
    if score == "learned":  # scores from relative magnitudes, trained by Adam
        norms = [block_sum(w.detach().float().square(), i).sqrt() for w, i in zip(weights, index, strict=True)]
        average = {name: [(n / n.mean()).requires_grad_() for n in norms] for name in LANGUAGES}
        adam = {name: torch.optim.Adam(average[name], lr=0.05, betas=(0.9, 0.98), eps=1e-12) for name in LANGUAGES}
    seen = dict.fromkeys(LANGUAGES, 0)
    scales = [torch.ones(int(i.max()) + 1, requires_grad=True) for i in index]
    scaling = torch.optim.Adam(scales, lr=scale_lr, betas=(0.9, 0.98), eps=1e-12)
    optimizer = make_optimizer(model.parameters())
    for step, (name, x, y) in enumerate(batches, 1):
        dense = [m[i] for m, i in zip(masks[name], index, strict=True)]
        inside = inside or (after and step > FREEZE)
        gates = [torch.ones_like(scale) for scale in scales]
        if hard and step <= FREEZE:
            gates = [
                hard_concrete(s, module, name, seen[name]) for module, s in zip((0, 2), average[name], strict=True)
            ]
        factors = [g.detach()[i] for g, i in zip(gates, index, strict=True)]
        gated = [w * f.to(w.dtype) for w, f in zip(weights, factors, strict=True)]
        used = [w * d if inside else w + (w * d - w).detach() for w, d in zip(gated, dense, strict=True)]
        loss = F.mse_loss(F.linear(torch.tanh(F.linear(x, used[0], biases[0])), used[1], biases[1]), y)
        optimizer.zero_grad()
        loss.backward()
        old = [(w.detach().clone(), copy.deepcopy(dict(optimizer.state[w]))) for w in weights]
        optimizer.step()
        seen[name] += 1
        with torch.no_grad():
            for layer, w in enumerate(weights):
                state = {k: v for k, v in optimizer.state[w].items() if torch.is_tensor(v) and v.shape == w.shape}
                if inside:
                    w[~dense[layer]] = old[layer][0][~dense[layer]]
                    for key, value in state.items():
                        earlier = old[layer][1].get(key)
                        value[~dense[layer]] = 0.0 if earlier is None else earlier[~dense[layer]]
                if score == "gradient":
                    importance = block_sum(w.float() * w.grad.float(), index[layer]).abs()
                    average[name][layer] = 0.98 * average[name][layer] + 0.02 * importance
                elif score == "movement":
                    average[name][layer] -= block_sum(w.float() * w.grad.float(), index[layer])
                elif score == "learned" and step <= FREEZE:
                    moved = block_sum(w.float() * w.grad.float(), index[layer])
                    scales[layer].grad = moved / scales[layer].detach()
                    average[name][layer].grad = moved
                    if hard:
                        gate = gates[layer]
                        through = torch.where(gate > 0, moved / gate, 0.0).detach()
                        (average[name][layer].grad,) = torch.autograd.grad(gate, average[name][layer], through)
            if score == "learned" and step <= FREEZE:
                adam[name].step()
            if scale_lr and step <= FREEZE:  # the weight moves as its factors do
                were = [scale.detach().clone() for scale in scales]
                scaling.step()
                for w, scale, was, i in zip(weights, scales, were, index, strict=True):
                    w *= (scale / was)[i].to(w.dtype)
            s = TARGET + (begin - TARGET) * (1 - min(1, step / (STEPS // 2))) ** 3 if cubic else TARGET
            count = step if shared else seen[name]
            everyone = step == FREEZE or (cubic and step == STEPS // 2)
            if fixed is None and step <= FREEZE and (everyone or count % INTERVAL == 0):
                for layer, w in enumerate(weights):
                    before = torch.stack([masks[n][layer] for n in LANGUAGES]).any(0)
                    for decided in LANGUAGES if shared or everyone else (name,):
                        if score == "magnitude":
                            rank = block_sum(w.float().square(), index[layer]).sqrt()
                        elif shared:
                            rank = sum(average[n][layer] / (1 - 0.98 ** seen[n]) for n in LANGUAGES if seen[n])
                        else:
                            rank = average[decided][layer]
                        among = masks[decided][layer].nonzero().flatten().tolist() if inside else range(len(rank))
                        masks[decided] = [*masks[decided]]
                        masks[decided][layer] = top(rank, among, s)
                    lost = before ^ torch.stack([masks[n][layer] for n in LANGUAGES]).any(0)
                    if inside:
                        for value in optimizer.state[w].values():
                            if torch.is_tensor(value) and value.shape == w.shape:
                                value[lost[index[layer]]] = 0.0
        yield [w.detach().clone() for w in weights], dict(masks)
