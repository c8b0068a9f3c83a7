"""`xmtf generate`: answer prompts greedily.

prompt  What comes after Monday?        what a decoder-only model continues, and an encoder-decoder reads
text    Tuesday                         what the model wrote behind it
"""

from __future__ import annotations

import argparse
import json
import os

from megatron_xmtf.cli.evaluate import add_model_arguments, parallel_from_arguments
from megatron_xmtf.errors import ConfigError, ExitCode

HELP = "Answer prompts with the most probable text, by a checkpoint or a Hugging Face model."
EXAMPLE = """\
  xmtf generate --checkpoint OUT --prompt "What comes after Monday?" --prompt "Japan is a country in"
  xmtf generate --hf DIR --prompt "Translate to French: Monday" --json"""

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
INDENT = 8
"""Columns of the labels `prompt` and `text`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="text to answer; may be given again")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens after which a text ends (default: 64)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of {prompt, text}, spaces as written")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    from megatron_xmtf.evaluation.evaluate import generate_checkpoint, generate_huggingface
    from megatron_xmtf.report.marked_tokens import uses_colour

    if not arguments.hf and not arguments.checkpoint:
        raise ConfigError("name a model: --checkpoint CKPT or --hf DIR.")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {arguments.max_new_tokens}: at least one is needed.")
    parallel, world_size = parallel_from_arguments(arguments)
    if arguments.hf:
        texts = generate_huggingface(
            arguments.hf, arguments.prompt, max_new_tokens=arguments.max_new_tokens, own_process=False
        )
    else:
        texts = generate_checkpoint(
            arguments.checkpoint,
            arguments.prompt,
            parallel=parallel,
            world_size=world_size,
            max_new_tokens=arguments.max_new_tokens,
            precision=arguments.precision,
        )
    if os.environ.get("RANK", "0") != "0":
        return int(ExitCode.DONE)
    pairs = list(zip(arguments.prompt, texts, strict=True))
    if arguments.json:
        print(json.dumps([{"prompt": prompt, "text": text} for prompt, text in pairs], indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_word(prompt, text, dim=uses_colour()) for prompt, text in pairs))
    return int(ExitCode.DONE)


def _word(prompt: str, text: str, *, dim: bool) -> str:
    """Lay out a prompt and below it what was written behind it, without spaces around them.

    Args:  dim: show the prompt in a weaker colour of a terminal.
    """
    asked = _labelled("prompt", prompt)
    return "\n".join([f"{DIM}{asked}{PLAIN}" if dim else asked, _labelled("text", text)])


def _labelled(label: str, words: str) -> str:
    lines = words.strip().splitlines() or [""]
    return "\n".join(f"{'' if number else label:<{INDENT}}{line}" for number, line in enumerate(lines))
