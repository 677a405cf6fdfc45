"""`bitdistiller chat`: talk to a model in the terminal; answers appear as they are made."""

from __future__ import annotations

import sys
from typing import Any

from bitdistiller_peft.cli import models
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb

LEAVE = ("/exit", "/quit")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Answer one prompt (--prompt), or every line that is typed until the end of input."""
    source, options = settings.arguments["model"], settings.arguments
    if settings.is_dry_run:
        return {"dry_run": True, "model": source}
    device = models.choose_device(settings, console)
    models.seed_all(settings)
    model = models.load_any(source, settings, device, key="MODEL").eval()
    tokenizer = models.load_tokenizer(*models.source_of_tokenizer(source, settings), settings=settings)
    messages = [{"role": "system", "content": options["system"]}] if options["system"] else []
    turns: list[dict[str, str]] = []
    prompts = iter([options["prompt"]]) if options["prompt"] else _typed(console)
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        answer = _answer(model, tokenizer, messages, options, console)
        messages.append({"role": "assistant", "content": answer})
        turns.append({"prompt": prompt, "answer": answer})
    return {"model": source, "turns": turns}


def _typed(console: Console) -> Any:
    """The lines that are typed; `/exit` and the end of input leave."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        console.note("/exit or Ctrl-D leaves.")
    while True:
        if is_terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() in LEAVE:
            return
        if line.strip():
            yield line.strip()


def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], options: Any, console: Console) -> str:
    import torch

    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:  # a base model: it continues
        inputs = tokenizer(messages[-1]["content"], return_tensors="pt")
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    temperature = options["temperature"]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if console.is_json else _Streamer(tokenizer, console)
    with torch.no_grad():
        ids = model.generate(
            **inputs,
            max_new_tokens=options["max_new_tokens"],
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


class _Streamer:
    """Writes text as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        self.tokenizer, self.console = tokenizer, console
        self.ids: list[int] = []
        self.written = ""
        self.is_prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt first, then token after token."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.reshape(-1).tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.startswith(self.written) and not text.endswith("\ufffd"):  # no half characters
            self.console.write(text[len(self.written) :])
            self.written = text

    def end(self) -> None:
        """Write what is left, and end the line."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.console.write(text[len(self.written) :] + "\n")


VERB = Verb(
    "chat",
    "talk to a model in the terminal",
    run,
    sections=("",),
    positionals=(Positional("model", "folder or Hub name"),),
    own=(
        Option("prompt", "text", "answer this and stop"),
        Option("system", "text", "system message"),
        Option("max_new_tokens", "int", "what an answer may take", 256),
        Option("temperature", "float", "of the sampling; 0 takes the likeliest token", 0.0),
    ),
    hidden=("model", "output", "revision"),
    epilog="example: bitdistiller chat out/distill/packed --prompt 'What is the capital of France?'",
)
