"""transformers' Trainer through its public doors: the loss in chunks, an exact evaluation, whole checkpoints.

What Trainer keeps by itself (adapters, optimizer, schedule, random states, position in the data) it also restores bit
for bit on a CPU. Added here: checkpoints that are whole or not there, the evaluations so far with the best adapters, an
evaluation that was still due, and an end in good order after Ctrl-C or SIGTERM.
"""

import functools
import math
import pickle
import time
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import AutocastKwargs
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DefaultFlowCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dialogue import machine, storage
from dialogue.chat.batch import answer
from dialogue.data.packing import collate, count_tokens, fill_up
from dialogue.errors import Signals, Stopped, UserError, said_in_a_line
from dialogue.measure.likelihood import Score
from dialogue.measure.loss import head_of, summed_nats
from dialogue.train import lora, runs, teach
from dialogue.train.options import Run, override
from dialogue.train.plan import Plan, count_evaluations, evaluation_seconds
from dialogue.train.progress import Progressed
from dialogue.train.runs import STATE, STATE_SHAPE

BEST = "best_adapter.safetensors"  # ours, beside Trainer's files
OPENERS = ("Hello, how are you?", "What do you like to eat?")  # answered at every evaluation, but for own data
SAMPLE_TOKENS = 24


class DialogueTrainer(Trainer):
    """Trains the adapters of a PeftModel on packed rows, and remembers the best of them."""

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, run: Run, record: dict[str, Any],
        progress: Progressed,
    ) -> None:  # fmt: skip
        """Leaves to `Keeper` what Trainer would do less carefully. `record` becomes run.json of each checkpoint."""
        changes = {
            "output_dir": str(run.checkpoints / runs.SAVING),  # until a checkpoint is whole
            "save_total_limit": None, "save_only_model": False, "load_best_model_at_end": False,
            "enable_jit_checkpoint": False, "push_to_hub": False, "remove_unused_columns": False,
        }  # fmt: skip
        arguments, train, held_out = override(plan.arguments, changes), plan.rows.train, plan.rows.held_out
        if arguments.world_size > 1:
            train = fill_up(train, arguments.train_batch_size * arguments.world_size)
        collator = functools.partial(collate, pad=held_out.pad)  # can be sent to a worker, a lambda cannot
        super().__init__(model, arguments, collator, train, held_out.rows, callbacks=[progress])
        self.peft_model, self.tokenizer, self.held_out, self.head = model, tokenizer, held_out, head_of(model)
        self.record, self.patience, self.progress = record, run.early_stopping_patience, progress
        self.openers, self.signals = plan.rows.openers[: len(OPENERS)] or OPENERS, Signals()
        before = teach.Before(model, self.head, plan.rows.train, held_out.pad) if run.teach else None
        self.summed_nats = before.summed_nats if before else summed_nats
        self.loss_is_scaled_for_ga = True  # over the labels of the whole accumulated batch
        # Trainer's fp16 is wanted for its scaled gradients alone: the weights are 16-bit already, and under autocast
        # LayerNorm returns float32, in which bitsandbytes' int8 backward pass would then multiply.
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # Trainer's own folder is SAVING
                callback.logging_dir = callback.logging_dir or str(run.checkpoints / "runs")
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.scores: dict[int, Score] = {}  # by step
        self.best_step: int | None = None
        self.best: dict[str, Tensor] = {}  # the trained parameters at that step, on the CPU
        self.began = time.perf_counter()  # earlier by what was spent before a stop

    @property
    def seconds(self) -> float:
        """Spent on this run so far."""
        return time.perf_counter() - self.began

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        """Nats a label of the whole batch of this step, of which `inputs` is a part; a float32 scalar."""
        loss = self.summed_nats(model, inputs, self.head) / num_items_in_batch
        if self.args.average_tokens_across_devices:  # the gradients of several processes are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapters only."""
        if self.args.should_save:
            lora.save(self.peft_model, self.tokenizer, Path(output_dir or str(self.args.output_dir)))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Nats a reply token over the whole validation set. Trainer's own average weighs each batch alike,
        however many tokens it has. Two sample replies are shown with it. A signal ends it, and the training."""
        self.signals.at_once = self.args.world_size == 1 and "plateau" not in str(self.args.lr_scheduler_type)
        began = time.perf_counter()
        try:
            score = self.held_out.score_in_shares(self.peft_model, self.args)
            samples = self.sample_replies() if self.is_world_process_zero() else []
        except Stopped:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        finally:
            self.signals.at_once = False
        metrics = {f"eval_{name}": value for name, value in score.figures().items()}
        metrics |= {"eval_loss": score.nats_per_token, "eval_seconds": time.perf_counter() - began}
        self.log(metrics)
        for opener, reply in samples:
            self.progress.say(f"  you> {opener}\n  bot> {reply}")
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.remember(score)
        return metrics

    def sample_replies(self) -> list[tuple[str, str]]:
        """Answers to `openers` by the model as it is now, drawn as the chat draws them. No random state is touched."""
        replies = answer(self.peft_model, self.tokenizer, [[opener] for opener in self.openers], max_t=SAMPLE_TOKENS)
        return [(opener, " ".join(reply.text.split())) for opener, reply in zip(self.openers, replies, strict=True)]

    def remember(self, score: Score) -> None:
        """Enter the score of this step; keep the adapters where it is the best, stop where none comes any more."""
        best = self.scores.get(self.best_step) if self.best_step is not None else None
        self.scores[self.state.global_step] = score
        if score.nats_per_token < (best.nats_per_token if best else math.inf):
            self.best_step = self.state.global_step
            self.best = lora.trained_weights(self.peft_model)
        self.control.should_training_stop |= self.is_over()

    def is_over(self) -> bool:
        """Whether all steps are done, or `patience` evaluations in a row brought nothing better."""
        later = sum(step > (self.best_step or 0) for step in self.scores)
        return self.state.global_step >= self.state.max_steps or 0 < self.patience <= later

    def write_state(self, folder: Path) -> None:
        """What is kept beside Trainer's own state."""
        scores = {str(step): list(score) for step, score in self.scores.items()}
        storage.write_json(folder / STATE, {"best_step": self.best_step, "seconds": self.seconds, "scores": scores})
        if self.best:
            save_file(self.best, folder / BEST)
        storage.write_json(folder / storage.RUN_FILE, self.record)

    def read_state(self, folder: Path) -> None:
        """What `write_state` wrote; Trainer restores its own state."""
        state = storage.read_json(folder / STATE, STATE_SHAPE)
        self.scores = {int(step): Score(*score) for step, score in state["scores"].items()}
        self.best_step = state["best_step"]
        self.began -= state["seconds"]
        self.best = load_file(folder / BEST) if self.best_step is not None else {}


class Over(Exception):
    """All steps are done, or no evaluation gets better any more, where a run was to go on."""


class Keeper(TrainerCallback):
    """Evaluates once more at the end, saves after a signal, and gives whole checkpoints their place."""

    def __init__(self, trainer: Any, home: Path, keep: int, seconds: float | None = None) -> None:
        self.trainer, self.home, self.keep = trainer, home, keep  # checkpoints go into `home`, so many are kept
        self.seconds = seconds  # that the training may take
        self.signal = 0  # that all processes know of
        self.saved_step = -1

    def on_train_begin(self, args, state, control, **keywords: Any) -> None:
        """Where a run goes on: the evaluation that its checkpoint, written in the middle of a step, still owes."""
        if state.global_step == 0:
            return
        self.saved_step = state.global_step
        due, flow = TrainerControl(), DefaultFlowCallback()  # what Trainer does at the end of this step
        flow.on_step_end(args, state, due)
        if state.global_step % math.ceil(len(keywords["train_dataloader"]) / args.gradient_accumulation_steps) == 0:
            flow.on_epoch_end(args, state, due)
        if due.should_evaluate and state.global_step not in self.trainer.scores:
            self.trainer.evaluate()
        if self.trainer.is_over() or control.should_training_stop:
            raise Over  # Trainer itself would do another step

    def on_step_end(self, args, state, control, **_: Any) -> None:
        readings = machine.gather((self.trainer.seconds, self.trainer.signals.number))
        self.signal = max(number for _, number in readings)  # whichever process got it, all stop at the same step
        spent = readings[0][0]
        if self.seconds and spent * (1 + 0.5 / state.global_step) > self.seconds:  # half a step is the best guess
            control.should_training_stop = True
        if control.should_training_stop:
            control.should_evaluate = True  # the last step's adapters count as well
        self._leave_if_asked(state, control)

    def on_epoch_end(self, args, state, control, **_: Any) -> None:
        control.should_evaluate &= state.global_step not in self.trainer.scores
        self._leave_if_asked(state, control)

    def _leave_if_asked(self, state, control) -> None:
        """After a signal: no evaluation any more, but a checkpoint, and the end."""
        if self.signal:
            control.should_evaluate, control.should_training_stop = False, True
            control.should_save = self.saved_step != state.global_step

    def on_save(self, args, state, control, **_: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        machine.gather(None)  # until each process has written its random states
        if args.should_save:
            written = Path(args.output_dir, name)
            self.trainer.write_state(written)
            storage.put_in_place(written, self.home / name)
            runs.clear(self.home, self.keep, state.global_step)
        self.saved_step = state.global_step


class Trained(NamedTuple):
    """How a training went."""

    steps: int
    best_step: int  # whose adapters the model has now
    seconds: float  # evaluations and checkpoints included; without the time between a stop and its resumption
    tokens: int  # padding left out
    tokens_per_second: float
    history: list[dict[str, float]]  # Trainer's log
    score: Score  # of the best step, on the validation split
    untuned: dict[str, float]  # figures of the model without its adapters


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, run: Run, record: dict[str, Any],
    checkpoint: Path | None = None, callbacks: tuple[TrainerCallback, ...] = (),
) -> Trained:  # fmt: skip
    """Train `model`'s adapters in place as planned; they end as they were at the step that scores best. `record` stands
    in each checkpoint as its run.json; with `checkpoint` the training goes on from there. Raises Stopped after a
    signal, with everything saved, and UserError where a checkpoint cannot be written."""
    model.config.use_cache = False  # a cache would also switch the packed rows' mask off
    known = teach.untuned(run.adapters, record["run"]) if run.teach else None
    began = time.perf_counter()
    with model.disable_adapter():
        untuned = known.figures if known else plan.rows.held_out.score_in_shares(model, plan.arguments).figures()
    seconds = evaluation_seconds(plan.rehearsal, plan.rows.held_out, plan.arguments)
    progress = Progressed(
        count_tokens(plan.rows.train) / len(plan.rows.train) * plan.rows_a_step,
        count_evaluations(plan.steps, len(plan.rows.train), plan.arguments),
        seconds if known else time.perf_counter() - began,
    )
    trainer = DialogueTrainer(model, tokenizer, plan, run, record, progress)
    keeper = Keeper(trainer, run.checkpoints, run.arguments.save_total_limit or 2, run.budget)
    for callback in (*callbacks, keeper):
        trainer.add_callback(callback)
    if checkpoint:
        trainer.read_state(checkpoint)
    try:
        with trainer.signals.noted(), said_in_a_line(run.checkpoints):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Over:
        pass
    except pickle.UnpicklingError as error:
        raise UserError(f"{checkpoint} holds something that may run code, and is not read: delete it") from error
    finally:
        progress.bar.stop()
    if trainer.signals.number or keeper.signal:
        at = f"step {keeper.saved_step} of {trainer.state.max_steps}: the same command goes on from there"
        said = "stopped before anything was saved" if keeper.saved_step < 0 else f"stopped and saved at {at}"
        raise Stopped(keeper.signal or trainer.signals.number, said)
    for name, parameter in model.named_parameters():
        if name in trainer.best:
            parameter.data.copy_(trainer.best[name])
    steps = trainer.state.global_step
    best = steps if trainer.best_step is None else trainer.best_step
    tokens = round(steps * progress.tokens_per_step)
    return Trained(steps, best, trainer.seconds, tokens, progress.rate, trainer.state.log_history,
                   trainer.scores[best], untuned)  # fmt: skip
