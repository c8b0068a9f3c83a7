"""`xmtf generate`: continue prompts greedily."""

from __future__ import annotations

import argparse
import json
import os

from megatron_xmtf.cli.evaluate import add_model_arguments, parallel_from_arguments
from megatron_xmtf.errors import ConfigError, ExitCode

HELP = "Continue prompts with the most probable text, by a checkpoint or a Hugging Face model."
EXAMPLE = """\
  xmtf generate --checkpoint OUT --prompt "What comes after Monday?" --max-new-tokens 16
  xmtf generate --hf DIR --prompt "Translate to French: Monday" --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given again")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens after which a text ends (default: 64)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of {prompt, text}")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    from megatron_xmtf.evaluation.evaluate import generate_checkpoint, generate_huggingface

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
    if arguments.json:
        pairs = [{"prompt": prompt, "text": text} for prompt, text in zip(arguments.prompt, texts, strict=True)]
        print(json.dumps(pairs, indent=2, ensure_ascii=False))
        return int(ExitCode.DONE)
    for prompt, text in zip(arguments.prompt, texts, strict=True):
        print(f"{prompt}{text}")
    return int(ExitCode.DONE)
