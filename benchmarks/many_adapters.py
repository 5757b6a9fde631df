"""What the first, the fortieth and the two hundredth adapter cost to load, and a switch among forty, against HF PEFT.

    OMP_NUM_THREADS=1 python benchmarks/many_adapters.py       # prints a table of seconds and ratios
    OMP_NUM_THREADS=1 python benchmarks/many_adapters.py --layers 2 --width 64 --adapters 40

Both libraries take turns, adapter by adapter, with the same folder and a base of the same weights. Each figure is the median of the loads
around it, in time of the processor, so that other programs disturb little.
"""

import argparse
import statistics
import tempfile
import time
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, inject, load_adapter, save_adapter, set_active_adapters


def base(args):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def timed(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def around(times, position):
    """Return the median of the three figures at ``position``, counted from 1; of the first there is one only."""
    return times[0] if position == 1 else statistics.median(times[max(1, position - 3) : position])


def switches(switch, names, rounds=5):
    return statistics.median(timed(lambda name=name: switch(name)) for _ in range(rounds) for name in names[:8])


def main():
    import peft

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 8), ("width", 256), ("rank", 8), ("adapters", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        model = base(args)
        inject(model, LoRA(rank=args.rank), "all_linear")
        save_adapter(model, folder)
        ours, theirs = base(args), None
        load_adapter(base(args), folder)  # what either library does once in a process
        peft.PeftModel.from_pretrained(base(args), folder)
        times = {"ours": [], "HF PEFT": []}
        names = [f"adapter_{i}" for i in range(args.adapters)]
        rows = []
        for count, name in enumerate(names, 1):
            times["ours"].append(timed(lambda name=name: load_adapter(ours, folder, name=name)))
            bare = base(args) if theirs is None else None
            start = time.process_time()
            if bare is not None:
                theirs = peft.PeftModel.from_pretrained(bare, folder, adapter_name=name)
            else:
                theirs.load_adapter(folder, adapter_name=name)
                theirs.set_adapter(name)  # ours is active after loading too
            times["HF PEFT"].append(time.process_time() - start)
            if count in (1, 2, 40, args.adapters):
                rows.append((f"load, adapter {count}", *(around(held, count) for held in times.values())))
            if count == 40:
                rows.append(
                    (
                        "switch among 40",
                        switches(lambda name: set_active_adapters(ours, name), names),
                        switches(theirs.set_adapter, names),
                    )
                )
    print(f"{'':20} {'ours, ms':>10} {'HF PEFT, ms':>12} {'ratio':>7}")
    for label, mine, other in rows:
        print(f"{label:20} {1000 * mine:10.1f} {1000 * other:12.1f} {mine / other:7.3f}")


if __name__ == "__main__":
    main()
