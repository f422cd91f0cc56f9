"""The OpenAI endpoint: a real server process, used by the real `openai` client."""

import asyncio
import inspect
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from safetensors.torch import load_file, save_file
from tiny import DEMO, TINY, Witness

from orchestrator.deploy.chat import Sampling
from orchestrator.deploy.find import find_adapter
from orchestrator.deploy.serving.adapter_server import open_adapter_servers
from orchestrator.record import SweepPaths, read_sweep, write_record
from orchestrator.spec import load_spec
from orchestrator.training.local import run_local_trial

pytestmark = [pytest.mark.slow, pytest.mark.long]

SERVE = [sys.executable, "-m", "orchestrator.cli", "serve"]
UNTRAINED = "untrained"
QUESTION, ANSWER = "What is the highest: 46, 72 or 5?", "# 72"
MANY = [(f"What is the highest: {i}, {90 - i} or {3 * i}?", f"# {max(i, 90 - i, 3 * i)}") for i in range(1, 33)]


@dataclass(frozen=True)
class Server:
    """A running server that has printed its address."""

    process: subprocess.Popen[str]
    said: dict[str, str]
    """The printed lines, by the word before the colon."""

    def client(self, token: str = "none is needed") -> openai.OpenAI:
        port = self.said["url"].rpartition(":")[2]  # 8000/v1
        return openai.OpenAI(base_url=f"http://127.0.0.1:{port}", api_key=token, max_retries=0)

    def end(self) -> tuple[int, str]:
        """Press Ctrl-C. Return the exit code and the output since the start."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err


@contextmanager
def serving(sweep: Path, *options: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [*SERVE, str(sweep), "--port", "0", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = {}
    try:
        for line in process.stdout:
            kind, _, value = line.strip().partition(":")
            said[kind] = value.strip()
            if kind == "try":
                break
        assert "url" in said, process.communicate()
        yield Server(process, said)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepPaths:
    """A sweep with two trials: one has learned the task, the adapter of the other changes nothing."""
    paths = SweepPaths(tmp_path_factory.mktemp("runs") / "one")
    lengths = [
        "data.max_rows=2000",
        "training.steps=120",
        "training.eval_steps=40",
        "scheduler={kind: asha, grace_steps: 40, reduction_factor: 2}",
    ]
    run_local_trial(load_spec(DEMO, [*TINY, *lengths]), paths, Witness())
    (trained,) = read_sweep(paths.root).trials()
    shutil.copytree(paths.trial(trained.trial_id).root, paths.trial(UNTRAINED).root)
    assert trained.best is not None
    worse = trained.best.model_copy(update={"value": trained.best.value + 1})
    write_record(paths.trial(UNTRAINED).result, trained.model_copy(update={"trial_id": UNTRAINED, "best": worse}))
    adapter = paths.trial(UNTRAINED).root / trained.best.adapter
    (adapter / "manifest.json").unlink()
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight * ("lora_A" in name) for name, weight in weights.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    return paths


@pytest.fixture(scope="module")
def server(sweep: SweepPaths) -> Iterator[Server]:
    with serving(sweep.root, "--top", "2") as running:
        yield running


def ask(client: openai.OpenAI, question: str = QUESTION, model: str = "one", **options: object) -> str | None:
    turns = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=turns, **options).choices[0].message.content  # type: ignore[call-overload]


def test_models_are_listed(server: Server, sweep: SweepPaths) -> None:
    client, (trained, _) = server.client(), read_sweep(sweep.root).trials()
    assert [model.id for model in client.models.list()] == [trained.trial_id, "one", UNTRAINED]
    assert client.models.retrieve("one").id == "one"
    assert server.said["models"] == f"{trained.trial_id}, one, {UNTRAINED}"


def test_chat_gives_the_trained_answer(server: Server) -> None:
    response = server.client().chat.completions.create(model="one", messages=[{"role": "user", "content": QUESTION}])
    assert response.choices[0].message.content == ANSWER
    assert response.choices[0].finish_reason == "stop"
    assert response.usage is not None
    assert (response.usage.prompt_tokens, response.usage.completion_tokens, response.usage.total_tokens) == (31, 6, 37)


def test_streaming_gives_the_same_answer(server: Server) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="one",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == ANSWER
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 37


def test_answers_end_at_max_tokens_and_stop_strings(server: Server) -> None:
    client = server.client()
    response = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": QUESTION}], max_completion_tokens=3
    )
    assert response.choices[0].finish_reason == "length"
    assert response.usage is not None
    assert response.usage.completion_tokens == 3
    assert ANSWER.startswith(response.choices[0].message.content or "nothing")
    assert ask(client, stop=["2", "9"]) == "# 7"


def test_completions_continue_the_given_text(server: Server) -> None:
    response = server.client().completions.create(model="one", prompt=f"<s>[INST] {QUESTION} [/INST]", max_tokens=8)
    assert response.choices[0].text.strip() == ANSWER
    assert response.usage is not None
    assert response.usage.prompt_tokens == 31


def test_concurrent_requests_get_their_own_answers_from_either_adapter(server: Server) -> None:
    client = server.client()
    models = ["one", UNTRAINED]

    def answer(i: int) -> str | None:
        return ask(client, MANY[i][0], models[i % 2], max_tokens=8)

    alone = [answer(i) for i in range(len(MANY))]
    with ThreadPoolExecutor(len(MANY)) as pool:
        together = list(pool.map(answer, range(len(MANY))))
    assert together == alone
    right = [given == wanted for given, (_, wanted) in zip(together, MANY, strict=True)]
    assert all(right[::2])
    assert not any(right[1::2])


def test_concurrent_requests_are_faster_than_sequential_ones(server: Server) -> None:
    client = server.client()
    with ThreadPoolExecutor(len(MANY)) as pool:
        list(pool.map(lambda asked: ask(client, asked[0]), MANY))  # opens the connections
        at_once, in_turn = [], []
        for _ in range(3):  # alternate, so that other load on the machine affects both
            began = time.perf_counter()
            together = list(pool.map(lambda asked: ask(client, asked[0], max_tokens=8), MANY))
            at_once.append(time.perf_counter() - began)
            assert together == [wanted for _, wanted in MANY]
            began = time.perf_counter()
            for question, _ in MANY:
                ask(client, question, max_tokens=8)
            in_turn.append(time.perf_counter() - began)
    at_once_s, in_turn_s = min(at_once), min(in_turn)
    print(f"\n{len(MANY) / at_once_s:.0f} requests/s at once, {len(MANY) / in_turn_s:.0f} one after another")
    assert at_once_s < in_turn_s / 1.5


def test_sampling_is_random_and_temperature_0_is_greedy(server: Server) -> None:
    client = server.client()
    drawn = {ask(client, model=UNTRAINED, temperature=2.0, max_tokens=8) for _ in range(4)}
    assert len(drawn) > 1
    assert ask(client, temperature=1.0, top_p=1e-9) == ANSWER
    assert ask(client, temperature=1e-300) == ANSWER  # dividing logits by this would overflow


def test_a_seed_repeats_a_sampled_answer_also_beside_other_requests(server: Server) -> None:
    client = server.client()

    def draw(seed: int) -> str | None:
        return ask(client, model=UNTRAINED, temperature=2.0, max_tokens=8, seed=seed)

    first = [draw(seed) for seed in range(4)]
    assert len(set(first)) > 1
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(4))) == first


def test_an_unknown_model_is_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'other' is not served here; choose from .*, one"):
        ask(server.client(), model="other")
    with pytest.raises(openai.NotFoundError):
        server.client().embeddings.create(model="one", input="x")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"temperature": 3}, "temperature: .* less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 4000}, "their sum must not exceed 1024"),
        ({"n": 2}, "n: "),
        ({"logprobs": True}, "logprobs: is not supported, except as false"),
        ({"response_format": {"type": "json_object"}}, r"response_format: is not supported, except as {.*text.*}"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: is not supported"),
        ({"logit_bias": {"5": 100}}, "logit_bias: is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: "),
        ({"store": True}, "store: is not supported"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation: "),
        ({"extra_body": {"messages": None}}, "messages: "),
        ({"extra_body": {"no_such": 1}}, "no_such: is not supported"),
        ({"extra_body": {"messages": []}}, "messages: "),
        ({"extra_body": {"messages": [{"role": "system", "content": "x"}]}}, "no system prompt and no earlier turns"),
    ],
)
def test_unsupported_requests_are_rejected(server: Server, options: dict[str, object], fault: str) -> None:
    with pytest.raises(openai.BadRequestError, match=fault):
        ask(server.client(), **options)
    assert ask(server.client(), seed=1) == ANSWER


NEUTRAL: dict[str, object] = {
    "response_format": {"type": "text"}, "logprobs": False, "top_logprobs": 0, "n": 1, "logit_bias": {},
    "frequency_penalty": 0, "presence_penalty": 0.0, "parallel_tool_calls": True, "tools": [], "tool_choice": "none",
    "store": False, "metadata": {}, "modalities": ["text"], "service_tier": "auto", "user": "me",
    "safety_identifier": "x", "prompt_cache_key": "x", "verbosity": "medium", "stop": [], "seed": 7,
}  # fmt: skip


def test_neutral_values_are_accepted(server: Server) -> None:
    """All fields of OpenAI's client, with their neutral values and as null."""
    client = server.client()
    assert ask(client, **NEUTRAL) == ANSWER
    parameters = inspect.signature(client.chat.completions.create).parameters
    own = {"self", "messages", "model", "stream", "extra_headers", "extra_query", "extra_body", "timeout"}
    nulls = dict.fromkeys(parameters.keys() - own)
    assert {"audio", "prediction", "reasoning_effort", "response_format", "web_search_options"} <= nulls.keys()
    assert ask(client, extra_body=nulls) == ANSWER
    text = {"best_of": 1, "echo": False, "suffix": "", "n": 1, "logit_bias": {}}
    response = client.completions.create(model="one", prompt=f"<s>[INST] {QUESTION} [/INST]", max_tokens=8, **text)  # type: ignore[call-overload]
    assert response.choices[0].text.strip() == ANSWER
    with pytest.raises(openai.BadRequestError, match="logprobs: is not supported") as refused:
        client.completions.create(model="one", prompt="x", logprobs=0)
    assert refused.value.param == "logprobs"
    assert refused.value.type == "invalid_request_error"


def test_an_answer_can_be_sent_back_but_a_tool_call_cannot(server: Server) -> None:
    client, asked = server.client(), {"role": "user", "content": QUESTION}
    message = client.chat.completions.create(model="one", messages=[asked]).choices[0].message  # type: ignore[list-item]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for sent, fault in (
        (message.model_dump(), "no earlier turns"),
        ({**message.model_dump(), "tool_calls": [call]}, "tool_calls"),
    ):
        with pytest.raises(openai.BadRequestError, match=fault):
            client.chat.completions.create(model="one", messages=[asked, sent, asked])  # type: ignore[list-item]


def test_a_closed_request_is_cancelled(sweep: SweepPaths) -> None:
    with open_adapter_servers([find_adapter(str(sweep.root), "runs")]) as (server,):
        server._stop_ids.clear()  # answers continue to max_new_tokens

        async def leave() -> None:
            async with aclosing(server.answer(server.form.ids("?"), 900, Sampling())) as pieces:
                async for _ in pieces:
                    break

        asyncio.run(leave())
        assert server._manager.output_router.result_handlers == {}
        deadline = time.monotonic() + 3  # 900 tokens take several seconds
        while server._manager.batch_processor.has_pending_requests():
            assert time.monotonic() < deadline, "the request is still active"
            time.sleep(0.01)  # a busy loop would slow the generating thread down
        assert server.alive
    assert not server.alive


def test_a_port_in_use_is_reported_before_a_model_is_loaded(server: Server, sweep: SweepPaths) -> None:
    port = server.said["url"].rpartition(":")[2].partition("/")[0]
    done = subprocess.run([*SERVE, str(sweep.root), "--port", port], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--port {port}: cannot listen on 127.0.0.1: Address already in use" in done.stderr


def test_a_public_address_needs_a_token_and_ctrl_c_stops_the_server_cleanly(sweep: SweepPaths) -> None:
    with serving(sweep.root, "--host", "0.0.0.0") as server:
        token = server.said["token"].partition(" ")[0]
        assert len(token) > 40
        assert ask(server.client(token)) == ANSWER
        for wrong in ("", "none", token[:-1]):
            with pytest.raises(openai.AuthenticationError, match="token is missing or wrong"):
                server.client(wrong or "x").models.list()
        code, said = server.end()
    assert code == 0
    assert token not in said
    assert "Traceback" not in said
