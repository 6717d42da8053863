"""The reversal curse: a masked model beside an autoregressive one (Berglund et al. 2024).

Both are trained on "NAME is DESCRIPTION" alone. The autoregressive one has no data for
"DESCRIPTION is"; the masked one fills in the name in the sentence that it was trained on.
"""

import random

import torch

import mdiff
from mdiff.backbones.transformer import transformer


def facts_of(count: int, rng: random.Random) -> list[list[str]]:
    """Sentences of seven invented words; no two share a name or a description."""
    words = ["".join(map(rng.choice, ("bdfgklmnprstvz", "aeiou") * 3)) for _ in range(200)]
    names = {(rng.choice(words[:50]), rng.choice(words[50:100])) for _ in range(9 * count)}
    deeds = {(*rng.choices(words[100:], k=2), "the", rng.choice(words[100:])) for _ in names}
    return [[*n, "is", *d] for n, d in zip(sorted(names), rng.sample(sorted(deeds), count))]


def train(model, loss, steps: int) -> None:
    """All facts at every step, the rate falling to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()


def main(count: int = 100, steps: int = 1500) -> dict[str, float]:
    """Train both, ask in both directions; print and return the shares of right answers."""
    sentences, right = facts_of(count, random.Random(0)), {}
    ids = {word: i for i, word in enumerate(sorted({w for line in sentences for w in line}))}
    facts = torch.tensor([[ids[word] for word in line] for line in sentences])
    (name, link, deed), mask = facts.split([2, 1, 4], 1), len(ids)
    shape = {"vocab_size": mask, "width": 96, "depth": 2, "heads": 4, "init_std": 0.1}
    torch.manual_seed(0)
    masked, causal = transformer(**shape), transformer(**shape, causal=True)
    known = {"space": mdiff.TokenSpace(mask, mask_id=mask), "schedule": mdiff.Linear()}
    train(masked, lambda s: mdiff.masked_diffusion_loss(masked, facts, seed=s, **known)[0], steps)
    shifted = torch.nn.functional.pad(facts[:, :-1], (1, 0), value=mask)
    train(causal, lambda s: torch.nn.functional.cross_entropy(causal(shifted).mT, facts), steps)
    for asked, answer, given in (("description", deed, name), ("name", name, deed)):
        gap, said = torch.full_like(answer, mask), torch.cat([shifted[:, :1], given, link], 1)
        canvas = torch.cat([gap, link, given] if asked == "name" else [given, link, gap], 1)
        filled = mdiff.sample(masked, canvas, temperature=0, **known).tokens[canvas == mask]
        for _ in range(gap.shape[1]):
            said = torch.cat([said, causal(said)[:, -1:].argmax(-1)], 1)
        replies = {"masked": filled.view_as(gap), "autoregressive": said[:, -gap.shape[1] :]}
        for model, reply in replies.items():
            right[f"{model}, asked for the {asked}"] = int((reply == answer).all(1).sum()) / count
    print("\n".join(f"{question:42}{share:7.1%}" for question, share in right.items()))
    return right


if __name__ == "__main__":
    main()
