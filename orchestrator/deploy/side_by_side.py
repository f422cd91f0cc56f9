"""Ask the base and the recommended adapter the same held-out prompts."""

from orchestrator.adapters.generate import answer
from orchestrator.data import load
from orchestrator.deploy.chat import open_chat
from orchestrator.deploy.finished import FinishedSweep
from orchestrator.errors import RequestError
from orchestrator.record import AnsweredPrompt, Answers, write_record


def record_answers(sweep: FinishedSweep, number: int) -> Answers:
    """Ask the first `number` held-out prompts, record the answers in the sweep's folder, and return them.

    Raises:
        RecordError: there is no adapter to ask, or it is damaged; or the rows were not pulled.
        RequestError: the rows have no prompts, or the base cannot be loaded.
    """
    winner = sweep.best()
    prompts = load(sweep.record.rows()).prompts[:number]
    if not prompts:
        raise RequestError(
            f"{sweep.record.paths.root}: its held-out rows have no prompts, so nothing can be asked",
            "Rows of data.format text have no prompts; `orchestrator chat` asks your own questions.",
        )
    config = winner.trial.config
    chat = open_chat(winner.adapter_ref())
    ids = [prompt.ids for prompt in prompts]
    new, batch = config.evaluation.max_new_tokens, config.training.eval_batch_size
    with chat.model.disable_adapter():
        before = answer(chat.model, chat.tokenizer, ids, new, batch)
    after = answer(chat.model, chat.tokenizer, ids, new, batch)
    answered = [
        AnsweredPrompt(
            prompt=chat.tokenizer.decode(prompt.ids, skip_special_tokens=True),
            expected=prompt.answer,
            base=base_answer,
            adapter=adapter_answer,
        )
        for prompt, base_answer, adapter_answer in zip(prompts, before, after, strict=True)
    ]
    assert winner.trial.best is not None
    answers = Answers(trial_id=winner.trial.trial_id, step=winner.trial.best.step, prompts=answered)
    write_record(sweep.record.paths.answers, answers)
    return answers
