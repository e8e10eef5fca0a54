"""A masked language model for measuring, where no trained one can be reached: an encoder and a new head over it.

    python -m qingyu.bench.masked_head CHECKPOINT OUT --texts FILE [--texts-most N] [--seconds S]

Writes OUT, a checkpoint that ``qingyu export OUT FOLDER --task fill-mask`` takes: the encoder of CHECKPOINT (a BERT) as
it is, and the head that transformers' BertForMaskedLM has, trained on the encoder's states of masked tokens of the
texts, one a line. The encoder is not trained, so this is a poor language model; but its weights and states are those
of real text, which random ones are not, and that is what the agreement of INT8 with FP32 depends on. Prints how often
the head's first word is right on the last twentieth of the texts, as JSON.

Needs the extra ``train``. Not here: a model worth using.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qingyu.models.extras import require

__all__ = ["main", "make"]

LENGTH = 48  # tokens of a text that are read
SHARE = 0.2  # of them masked at once; more than BERT's 0.15, as every state costs a whole row
ROWS = 32
BATCH = 512  # states
PASSES = 4
SEED = 7
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def make(checkpoint: Path, out: Path, texts: Sequence[str], *, seconds: float) -> dict[str, Any]:
    """Train the head and write the checkpoint; states are collected for at most ``seconds``."""
    require("train", "torch", "transformers")
    import torch
    import transformers

    torch.manual_seed(SEED)
    encoder = transformers.AutoModel.from_pretrained(str(checkpoint), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    states, words, held = _collect(encoder, tokenizer, texts, seconds)
    config = transformers.BertConfig.from_pretrained(str(checkpoint), architectures=["BertForMaskedLM"])
    model = transformers.BertForMaskedLM(config)
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    head = model.cls.predictions
    head.decoder.weight.requires_grad_(False)  # the encoder's word table
    cut = len(words) - held
    counts = torch.bincount(words[:cut], minlength=config.vocab_size).float()
    head.bias.data = torch.log((counts + 1) / (counts + 1).sum())
    head.decoder.bias = head.bias
    _train(head, states[:cut], words[:cut])
    with torch.no_grad():
        right = [
            (head(states[n : n + BATCH]).argmax(-1) == words[n : n + BATCH]).sum().item()
            for n in range(cut, len(words), BATCH)
        ]
    model.save_pretrained(str(out))
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    return {"states": cut, "held out": held, "right": round(sum(right) / held, 4)}


def _collect(encoder: Any, tokenizer: Any, texts: Sequence[str], seconds: float) -> tuple[Any, Any, int]:  # noqa: ANN401 - torch's and transformers' own
    """States float32 (masked, hidden), the words that stood there, and how many of them, the last, are held out."""
    import torch

    start, total = time.monotonic(), -(-len(texts) // ROWS)
    states, words, sizes = [], [], []
    for done, batch in enumerate(_batches(texts)):
        if time.monotonic() - start > seconds:
            total = done
            break
        row = tokenizer(batch, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        special = torch.tensor(
            [
                tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
                for ids in row["input_ids"].tolist()
            ]
        ).bool()
        hidden = (torch.rand(special.shape) < SHARE) & ~special
        words.append(row["input_ids"][hidden])
        row["input_ids"] = row["input_ids"].masked_fill(hidden, tokenizer.mask_token_id)
        with torch.no_grad():
            states.append(encoder(**row).last_hidden_state[hidden])
        sizes.append(len(words[-1]))
    return torch.cat(states), torch.cat(words), sum(sizes[total - max(1, total // 20) : total])


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    for first in range(0, len(texts), ROWS):
        yield list(texts[first : first + ROWS])


def _train(head: Any, states: Any, words: Any) -> None:  # noqa: ANN401 - torch's own
    import torch

    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=1e-3)
    steps = PASSES * -(-len(words) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    head.train()
    for _ in range(PASSES):
        for chosen in torch.randperm(len(words)).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(states[chosen]), words[chosen]).backward()
            optimizer.step()
            schedule.step()
    head.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qingyu.bench.masked_head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="one text a line")
    parser.add_argument("--texts-most", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=3600, metavar="S", help="for states (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    with options.texts.open(encoding="utf-8") as lines:
        texts = [line.strip() for _, line in zip(range(options.texts_most), lines, strict=False)]
    found = make(options.checkpoint, options.out, texts, seconds=options.seconds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
