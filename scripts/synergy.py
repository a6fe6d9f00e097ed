"""Whether two changes together do more than the sum of what each does alone, from the runs of a comparison.

    lightning-distill compare -c examples/synergy_mnist1d.yaml
    python scripts/synergy.py runs/synergy_mnist1d --base "float, labels" --first "float, taught" \\
        --second "2 bits, labels" --joint "2 bits, taught"

Prints what each change does, and ``joint - first - second + base`` over the seeds, with a 95 % interval: two changes
help each other only where that is above 0.
"""

from __future__ import annotations

import argparse
import statistics

from lightning_distill.comparison import Comparison
from lightning_distill.diagnostics import synergy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the comparison")
    for name in ("base", "first", "second", "joint"):
        parser.add_argument(f"--{name}", required=True, help="name of a method")
    arguments = parser.parse_args()
    found = Comparison.load(arguments.folder)
    scores = {}
    for name in ("base", "first", "second", "joint"):
        method = getattr(arguments, name)
        if method not in found.methods:
            parser.error(f"--{name}: {method!r} is none of the methods {found.methods}")
        scores[name] = found.values(method)
        print(f"{name:>6}  {statistics.mean(scores[name].values()):.4f}  {method}")
    seeds = sorted(set.intersection(*(set(values) for values in scores.values())))
    base, first, second, joint = ([values[seed] for seed in seeds] for values in scores.values())
    interaction = synergy(base, first, second, joint)
    print(f"joint - first - second + base: {interaction.value:+.4f} [{interaction.low:+.4f}, {interaction.high:+.4f}]")
    print(f"over {len(seeds)} seeds; that it is above 0 is {interaction.verdict()}")


if __name__ == "__main__":
    main()
