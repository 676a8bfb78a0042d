"""How good is the bot? The tuned model and its untuned base, side by side.

    python -m dialogue.evaluate                              the model that was trained last, on its own test split;
                                                             the figures also go into its model cards
    python -m dialogue.evaluate --model DIR --dataset dailydialog --json figures.json
    python -m dialogue.evaluate --compare                    both answer the same openers

What each figure means stands in docs/evaluation.md.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from dialogue import machine, models
from dialogue.chat.batch import answer
from dialogue.chat.sampling import CHAT
from dialogue.data import packing
from dialogue.data.corpus import Dialogues, fold, own_openers, rough, without_leaks, without_overlap
from dialogue.data.exports import SILENCE
from dialogue.data.sources import KNOWN, load_corpus
from dialogue.errors import Parser, UserError, exit_code, in_a_line
from dialogue.measure import listening, merge
from dialogue.measure.likelihood import Estimate, Score, bootstrap, score_each
from dialogue.measure.listening import Lent
from dialogue.measure.replies import OPENERS, find_contexts, measure
from dialogue.measure.report import Results, as_numbers, in_words, keep_evaluation
from dialogue.plaintext import plain
from dialogue.storage import MANIFEST, RUN_FILE, locked, read_json, write_json

MAX_LENGTH = 1024  # tokens; longer dialogues are cut between turns


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m dialogue.evaluate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="gpt2-dialogue-full", metavar="DIR", help="merged model or adapters (default: %(default)s)")
    add("--base", metavar="NAME", help="the untuned model to compare with (default: what it was trained from)")
    add("--dataset", metavar="SOURCE", help="as for Fine_tuningmodel.py (default: what it was trained on)")
    add("--bot", metavar="NAME", help="as for Fine_tuningmodel.py (default: as it was trained, on the same data)")
    add("--split", choices=["validation", "test"], default="test", help="default: %(default)s")
    add("--max_dialogues", type=_from_one, metavar="N", help="the first N of the split only")
    add("--contexts", type=_from_one, default=100, metavar="N", help="contexts to reply to (default: %(default)s)")
    add("--max_t", type=_from_one, default=60, metavar="N", help="tokens of a reply, at most (default: %(default)s)")
    add("--sampler", choices=["defaults", "fitted"], default="defaults", help="as for main.py (default: %(default)s)")
    add("--seed", type=_seed, default=0, metavar="N", help="of contexts, replies and intervals (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures there as well")
    add("--compare", action="store_true", help="show both models' replies to the openers, and no figures")
    add("--debug", action="store_true", help="show a traceback for every error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Score both models one after the other, so that there is memory for one only."""
    flags = parse(argv)
    console = Console()
    run = read_json(Path(flags.model) / RUN_FILE).get("settings")  # of the run that wrote the folder
    run = run if isinstance(run, dict) else {}
    own_data = bool(run) and not (flags.base or flags.dataset or flags.bot or flags.max_dialogues)
    flags.base = flags.base or run.get("base_model")
    tokenizer = models.dialogue_tokenizer(flags.model)
    loaders = _loaders(flags.model, flags.base, tokenizer, flags.max_t)
    dataset = flags.dataset or run.get("dataset")
    bot = flags.bot or (None if flags.dataset else run.get("bot"))
    reading = (bot, run.get("silence") or SILENCE)
    if flags.compare:
        own = () if dataset in (None, *KNOWN) else own_openers(load_corpus(dataset, *reading), len(OPENERS))
        compare(loaders, tokenizer, own or OPENERS, flags.max_t, flags.seed)
        return
    if not dataset:
        raise UserError(f"{flags.model} does not say what it was trained on: give --dataset")
    talk = load_corpus(dataset, *reading)
    split: Dialogues = getattr(talk, flags.split)[: flags.max_dialogues]
    if not split:
        raise UserError(f"{talk.source} has no {flags.split} dialogues")
    apart = without_overlap(split, talk.train)
    known = {fold(turn) for turns in without_leaks(talk).train[: run.get("max_train_dialogues")] for turn in turns}
    results = figures(loaders, tokenizer, split, apart, known, flags)
    few = rough(min(len(apart or split), flags.contexts))
    how = f"sampler: {flags.sampler}; seed {flags.seed}; 95 % intervals{few}"
    about = f"{talk.source}, {flags.split} split; {how}"
    show(console, results, about)
    if own_data:
        keep(Path(flags.model), run, about, results)
    if flags.json:
        facts = {name: str(value) for name, value in vars(flags).items() if name not in ("json", "debug")}
        try:
            write_json(flags.json, {"settings": {**facts, "dataset": dataset}, **as_numbers(results)})
        except OSError as error:
            raise UserError(f"{flags.json} could not be written: {error.strerror}") from error


def keep(model: Path, settings: dict[str, Any], about: str, results: Results) -> None:
    """Put the figures into the model cards of both folders of the run that wrote `model`, where it lies among them."""
    beside, run = Path(os.path.realpath(model)).parent, read_json(model / RUN_FILE)
    names = (str(settings.get(name)) for name in ("adapter_dir", "merged_dir"))
    for folder in {model.resolve(), *(beside / Path(name).name for name in names)}:
        if read_json(folder / RUN_FILE) == run and (folder / MANIFEST).is_file():
            try:
                with locked(folder):
                    keep_evaluation(folder, about, results)
            except (OSError, UserError) as error:
                print(f"the model card in {folder} stays without these figures: {in_a_line(error)}", file=sys.stderr)


def figures(
    loaders: Lent, tokenizer: PreTrainedTokenizerBase, split: Dialogues, apart: Dialogues, known: set[str],
    flags: argparse.Namespace,
) -> Results:  # fmt: skip
    """All figures; `apart` are the dialogues of `split` that do not overlap training, `known` training's turns."""
    sampling = CHAT if flags.sampler == "defaults" else merge.read_sampler(Path(flags.model))
    contexts = find_contexts(apart or split, flags.contexts, flags.seed, shortest=3, longest=listening.LONGEST)
    plain = models.load_tokenizer(flags.base)
    results: Results = {"base": {}, "tuned": {}, "people": {}}
    for who, load in loaders.items():
        with load() as model:
            said = answer(model, tokenizer, [[opener] for opener in OPENERS], sampling, flags.max_t, flags.seed)
            of_openers = bootstrap(len(said), measure(said, OPENERS, known), flags.seed)
            results[who] = likelihood(model, tokenizer, split, apart, flags.seed)
            results[who][f"replies to {len(OPENERS)} openers"] = of_openers
    heard = listening.compare(loaders, tokenizer, plain, contexts, sampling, flags.max_t, flags.seed, known)
    for who, found in heard.items():
        results[who][f"replies to {len(contexts)} contexts"] = found
    return results


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


def compare(loaders: Lent, tokenizer: PreTrainedTokenizerBase, openers: Sequence[str], max_t: int, seed: int) -> None:
    """Both models' replies to the openers in a table, with the same seed."""
    columns = []
    for load in loaders.values():
        with load() as model:
            columns.append(answer(model, tokenizer, [[opener] for opener in openers], max_t=max_t, seed=seed))
    table = Table("opener", *loaders, title=f"The same {len(openers)} openers, seed {seed}", show_lines=True)
    for opener, *said in zip(openers, *columns, strict=True):
        table.add_row(*(plain(text).replace("[", "\\[") for text in (opener, *(reply.text for reply in said))))
    Console().print(table)


def show(console: Console, results: Results, title: str) -> None:
    """A table with a column for each model and one for people's replies."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for heading in ("", *results):
        table.add_column(heading, min_width=0 if heading else 18)
    for on, figures in results["tuned"].items():
        table.add_row(f"[bold]{on}[/]")
        for name in figures:
            cells = [results[who].get(on, {}).get(name) for who in results]
            table.add_row(f"  {name.replace('_', ' ')}", *(in_words(name, cell) if cell else "" for cell in cells))
    console.print(table)


def _from_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def _seed(text: str) -> int:
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {2**32 - 1}")
    return int(text)


def _loaders(name: str, base: str | None, tokenizer: PreTrainedTokenizerBase, max_t: int) -> Lent:
    """What lends the untuned base and the tuned model, in one precision and with the same role tokens."""
    if not base:
        raise UserError(f"{name} does not say which model it was trained from: give --base")
    if Path(base).resolve() == Path(name).resolve():
        raise UserError(f"--base and --model are both {name}: nothing would differ")
    longest = models.context_length(models.load_config(base)) // 2
    if max_t > longest:
        raise UserError(f"--max_t {max_t} leaves too little of the context for what was said: at most {longest}")
    device = machine.pick_device()
    dtype = machine.pick_dtype(device)

    def load_base() -> Any:
        return models.load_base(base, dtype, device, tokenizer).eval()

    @contextmanager
    def lend(load: Callable[[], Any]) -> Iterator[Any]:
        yield load()
        machine.release_memory()

    return {"base": lambda: lend(load_base), "tuned": lambda: lend(lambda: models.load(name, dtype, device)[0])}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_grad_enabled(False)
    sys.exit(exit_code(main, debug="--debug" in sys.argv))
