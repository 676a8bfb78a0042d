"""How good is the bot? The tuned model and its untuned base, side by side.

    python -m dialogue.evaluate                              the model that was trained last, on its own test split
    python -m dialogue.evaluate --model DIR --dataset dailydialog --json figures.json
    python -m dialogue.evaluate --compare                    both answer the same openers

What each figure means stands in docs/evaluation.md.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from dialogue import machine, models
from dialogue.data import packing
from dialogue.data.corpus import Dialogues, fold, without_leaks, without_overlap
from dialogue.data.sources import load_corpus
from dialogue.errors import UserError, exit_code
from dialogue.measure import merge
from dialogue.measure.likelihood import Estimate, Score, bootstrap, score_each
from dialogue.measure.replies import CHAT, OPENERS, Context, Reply, answer, check_openers, find_contexts, measure
from dialogue.storage import RUN_FILE, read_json, write_json

REFERENCE_PACKAGES = "sacrebleu==2.6.0 rouge-score==0.1.2"
MAX_LENGTH = 1024  # tokens; longer dialogues are cut between turns

Results = dict[str, dict[str, dict[str, Estimate]]]  # who -> what on -> figures


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dialogue.evaluate", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add = parser.add_argument
    add("--model", default="gpt2-dialogue-full", metavar="DIR", help="merged model or adapters (default: %(default)s)")
    add("--base", metavar="NAME", help="the untuned model beside it (default: what it was trained from)")
    add("--dataset", metavar="SOURCE", help="as for Fine_tuningmodel.py (default: what it was trained on)")
    add("--split", choices=["validation", "test"], default="test")
    add("--max_dialogues", type=int, metavar="N", help="the first N of the split only")
    add("--contexts", type=int, default=200, metavar="N", help="replies to generate (default: %(default)s)")
    add("--max_t", type=int, default=60, metavar="N", help="tokens of a reply, at most (default: %(default)s)")
    add("--sampler", choices=["defaults", "fitted"], default="defaults", help="as for main.py")
    add("--seed", type=int, default=0, metavar="N", help="of contexts, replies and intervals (default: %(default)s)")
    add("--references", action="store_true", help="BLEU and ROUGE-L too (pip install " + REFERENCE_PACKAGES + ")")
    add("--json", type=Path, metavar="FILE", help="write all figures there as well")
    add("--compare", action="store_true", help="show both models' replies to the openers, and no figures")
    add("--debug", action="store_true", help="show a traceback for every error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Score both models one after the other, so that there is memory for one only."""
    flags = parse(argv)
    console = Console()
    run = _run_settings(Path(flags.model))
    tokenizer = models.dialogue_tokenizer(flags.model)
    loaders = _loaders(flags.model, flags.base or run.get("base_model"), tokenizer)
    if flags.compare:
        compare(console, loaders, tokenizer, flags.max_t, flags.seed)
        return
    if flags.references:
        check_references()
    dataset = flags.dataset or run.get("dataset")
    if not dataset:
        raise UserError(f"{flags.model} does not say what it was trained on: give --dataset")
    talk = load_corpus(dataset)
    split: Dialogues = getattr(talk, flags.split)[: flags.max_dialogues]
    if not split:
        raise UserError(f"{talk.source} has no {flags.split} dialogues")
    apart = without_overlap(split, talk.train)
    known = {fold(turn) for turns in without_leaks(talk).train[: run.get("max_train_dialogues")] for turn in turns}
    contexts = find_contexts(apart or split, flags.contexts, flags.seed)
    results: Results = {}
    for who, load in loaders.items():
        model = load()
        results[who] = {
            **likelihood(model, tokenizer, split, apart, flags.seed),
            **generated(model, tokenizer, contexts, known, flags),
        }
        del model
        machine.release_memory()
    people = [Reply(context.human, True) for context in contexts]
    results["people"] = {"replies": bootstrap(len(people), measure(people, known), flags.seed)}
    show(
        console,
        results,
        f"{talk.source}, {flags.split} split; sampler: {flags.sampler}; seed {flags.seed}; 95 % intervals",
    )
    if flags.json:
        named = {who: {on: {n: e._asdict() for n, e in f.items()} for on, f in r.items()} for who, r in results.items()}
        facts = {name: str(value) for name, value in vars(flags).items() if name not in ("json", "debug")}
        write_json(flags.json, {"settings": {**facts, "dataset": dataset}, **named})


def likelihood(
    model: Any, tokenizer: PreTrainedTokenizerBase, split: Dialogues, apart: Dialogues, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Figures of the replies of the whole split, and of those dialogues of it that do not overlap training."""
    ours = {id(turns) for turns in apart}
    length = min(MAX_LENGTH, models.context_length(model.config))
    parts = [apart, [turns for turns in split if id(turns) not in ours]]
    pieces = [packing.encode(tokenizer, dialogues, length).pieces for dialogues in parts]
    scores = score_each(model, pieces[0] + pieces[1], tokenizer)
    found = {f"all {len(split):,} dialogues": scores}
    if parts[1] and pieces[0]:
        found[f"the {len(apart):,} that do not overlap train"] = scores[: len(pieces[0])]
    return {
        on: bootstrap(len(rows), lambda at, rows=rows: Score(*rows[at].sum(axis=0).tolist()).figures(), seed)  # type: ignore[misc]
        for on, rows in found.items()
    }


def generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: list[Context], known: set[str], flags: argparse.Namespace
) -> dict[str, dict[str, Estimate]]:
    """Figures of the model's own replies: to contexts of the split, and to the openers."""
    sampling = CHAT if flags.sampler == "defaults" else merge.read_sampler(Path(flags.model))

    def ask(turns: Dialogues) -> list[Reply]:
        return answer(model, tokenizer, turns, sampling, flags.max_t, flags.seed)

    replies = ask([context.turns for context in contexts])
    found = {"replies": bootstrap(len(replies), measure(replies, known), flags.seed)}
    if flags.references:
        people = [context.human for context in contexts]
        found["replies"] |= bootstrap(len(replies), references(replies, people), flags.seed)
    to_openers = check_openers(OPENERS, ask([[opener] for opener in OPENERS]))
    checks = {name: np.array(passed) for name, passed in to_openers.items()}
    shares = bootstrap(
        len(OPENERS),
        lambda at: {f"share_that_{n}": float(passed[at].mean()) for n, passed in checks.items()},
        flags.seed,
    )
    return {**found, f"replies to {len(OPENERS)} openers": shares}


def check_references() -> None:
    """Raises UserError where the packages of `references` are not installed."""
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise UserError(f"--references needs two more packages: pip install {REFERENCE_PACKAGES}") from error


def references(replies: list[Reply], people: list[str]) -> Callable[[np.ndarray], dict[str, float]]:
    """BLEU (sacrebleu, 0 to 100) and ROUGE-L (F-measure, 0 to 1) against one human reply each."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    bleu, rouge = BLEU(effective_order=True), RougeScorer(["rougeL"])
    texts = [(reply.text, human) for reply, human in zip(replies, people, strict=True)]
    sentences = [bleu.sentence_score(text, [human]) for text, human in texts]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in sentences])
    overlaps = np.array([rouge.score(human, text)["rougeL"].fmeasure for text, human in texts])

    def figures(at: np.ndarray) -> dict[str, float]:
        total = counts[at].sum(axis=0).tolist()
        score = BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score
        return {"bleu": score, "rouge_l": float(overlaps[at].mean())}

    return figures


def compare(
    console: Console,
    loaders: dict[str, Callable[[], Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_t: int,
    seed: int,
) -> None:
    """Both models' replies to the openers in a table, with the same seed. Raises UserError for equal weights."""
    columns, weights = [], []
    for load in loaders.values():
        model = load()
        # Not the embedding: its role rows begin as means, which one precision rounds otherwise than another.
        ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        weights.append([p.double().sum().item() for p in model.parameters() if id(p) not in ends])
        columns.append(
            [reply.text for reply in answer(model, tokenizer, [[o] for o in OPENERS], max_t=max_t, seed=seed)]
        )
        del model
        machine.release_memory()
    if weights[0] == weights[1]:
        raise UserError("both columns would come from the same weights: nothing was trained, or --base is --model")
    table = Table("opener", *loaders, title=f"The same {len(OPENERS)} openers, seed {seed}", show_lines=True)
    for row in zip(OPENERS, *columns, strict=True):
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(table)
    moved = sum(ours != theirs for ours, theirs in zip(*weights, strict=True))
    console.print(f"{moved} of {len(weights[0])} weight tensors below the embedding differ between the columns.")


def show(console: Console, results: Results, title: str) -> None:
    """A table with a column for each model and one for people's replies."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for heading in ("", *results):
        table.add_column(heading, min_width=0 if heading else 18)
    for on, figures in results["tuned"].items():
        table.add_row(f"[bold]{on}[/]")
        for name in figures:
            cells = [results[who].get(on, {}).get(name) for who in results]
            table.add_row(f"  {name.replace('_', ' ')}", *(_cell(name, cell) if cell else "" for cell in cells))
    console.print(table)


def _cell(name: str, estimate: Estimate) -> str:
    if name.startswith("share"):
        return f"{estimate.value:.1%} [dim]({estimate.low:.0%}-{estimate.high:.0%})[/]"
    digits = 1 if abs(estimate.value) >= 10 else 2
    value, low, high = (f"{figure:,.{digits}f}" for figure in estimate)
    return f"{value} [dim]({low}-{high})[/]"


def _run_settings(model: Path) -> dict[str, Any]:
    """The settings of the run that wrote the folder, as far as they are known."""
    settings = read_json(model / RUN_FILE).get("settings")
    return settings if isinstance(settings, dict) else {}


def _loaders(name: str, base: str | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[], Any]]:
    """Functions that load the untuned base and the tuned model, in one precision and with the same role tokens."""
    if not base:
        raise UserError(f"{name} does not say which model it was trained from: give --base")
    device = machine.pick_device()
    dtype = machine.pick_dtype(device)

    def load_base() -> Any:
        return models.load_base(base, dtype, device, tokenizer).eval()

    return {"base": load_base, "tuned": lambda: models.load(name, dtype, device)[0]}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_grad_enabled(False)
    sys.exit(exit_code(main, debug="--debug" in sys.argv))
