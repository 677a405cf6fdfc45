"""The packed model of the demo in a fresh process: evaluated, and asked a question.

python examples/demo_reload.py FOLDER TEXT CHUNKS   # prints one line of JSON; about ten seconds
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from demo_measure import say
from transformers import AutoTokenizer
from workbench import SEQ_LEN, load_fast

from bitdistiller_peft import evaluate_perplexity

QUESTION = "What is the capital of France?"


def evaluate_elsewhere(folder: Path, evaluation: str, chunks: int) -> dict:
    """Run this file on a packed model: `perplexity`, `protocol` and `answer`."""
    text = folder.parent / "evaluation.txt"
    text.write_text(evaluation, encoding="utf-8")
    command = [sys.executable, __file__, str(folder), str(text), str(chunks)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main(folder: str, text: str, chunks: str) -> None:
    """Reload, evaluate, ask."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_fast(folder)
    evaluation = Path(text).read_text(encoding="utf-8")
    result = evaluate_perplexity(model, tokenizer, evaluation, seq_len=SEQ_LEN, max_chunks=int(chunks))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    say(json.dumps({"perplexity": result.perplexity, "protocol": result.protocol, "answer": answer}))


if __name__ == "__main__":
    main(*sys.argv[1:])
