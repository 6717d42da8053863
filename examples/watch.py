"""Watch the steps of a sampler: it is a generator, and the loop around it is the caller's.

python examples/watch.py ["a line with [MASK:9] gaps"]
"""

import sys

import mdiff

GAP = "░"


def main(template: str = "To be, or[MASK:9], that is[MASK:4]\n", every: int = 3) -> list[str]:
    """Print the text as it stands after every few reveals; return those lines."""
    model = mdiff.load("builtin:shakespeare")
    (run,) = model.runs(model.templates(template), sampler="confidence", temperature=0.7, seed=3)
    lines = []
    for state in run:
        if state.step % every == 1 or not (state.tokens == model.space.mask_id).any():
            shown = [
                GAP if token == model.space.mask_id else model.modality.decode([token])
                for token in state.tokens[0].tolist()
            ]
            lines.append("".join(shown).strip().replace("\n", " / "))
            print(f"{int(state.calls[0]):3} calls  {lines[-1]}")
    (sample,) = run.finished()
    print(f"log-probability {sample.log_prob:.1f} nats, entropy {sample.entropy:.2f} a draw")
    return lines


if __name__ == "__main__":
    main(*sys.argv[1:2])
