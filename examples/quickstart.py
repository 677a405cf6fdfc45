"""From a full-precision model to a packed 2-bit one and back from disk, in seconds on a CPU.

Run: python examples/quickstart.py [MODEL] [OUTPUT]

MODEL is a Hub name or a folder; without it a tiny random Llama is used, which shows the path and not the quality.
It trains with plain cross-entropy on a few sentences: no teacher, no calibration.

Without MODEL (6 seconds of CPU time): the loss falls from 5.27 at step 5 to 4.88 at step 20, and the last line ends in
True.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model, print_quant_summary, use_backend

STEPS = 20
LEARNING_RATE = 1e-3


def load_model(name: str | None) -> torch.nn.Module:
    """Load the named model, or make a tiny one."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def train(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """A few steps of quantization-aware fine-tuning."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for step in range(1, STEPS + 1):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}/{STEPS}: loss {loss.item():.3f}")
    model.eval()


def main() -> None:
    """Quantize, train, pack, save, reload, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="Hub name or folder; default: a tiny random Llama")
    parser.add_argument("output", nargs="?", default="runs/quickstart", help="folder to save to")
    args = parser.parse_args()

    model = get_bitdistiller_model(load_model(args.model), BitDistillerConfig(bits=2, group_size=64))
    print_quant_summary(model)
    ids = torch.tensor([list(b"Two bits are enough for anybody, if they are trained. " * 4)])
    train(model, ids)

    with torch.no_grad():
        trained = model(ids).logits
        packed = model.pack_and_unload()
        packed.save_pretrained(args.output)
        reloaded = AutoModelForCausalLM.from_pretrained(args.output)
        with use_backend("reference"):  # the backend that adds in the order of the training forward
            same = torch.equal(reloaded(ids).logits, trained)
    print(f"saved to {args.output}; reloaded logits equal the trained ones: {same}")


if __name__ == "__main__":
    main()
