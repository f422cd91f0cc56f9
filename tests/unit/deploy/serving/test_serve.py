"""A service is planned and validated before a model is loaded."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base import load_tokenizer
from orchestrator.deploy.chat import PromptForm, question_template
from orchestrator.deploy.serving.adapter_server import _TextStream
from orchestrator.deploy.serving.serve import Service, _vllm_call, _why_not_vllm, plan_service
from orchestrator.deploy.serving.vllm import vllm_command
from orchestrator.errors import RecordError, RequestError
from orchestrator.record import SweepPaths
from orchestrator.spec.sections import BaseSection, DataSection

MakeSweep = Callable[..., SweepPaths]
Plan = Callable[..., Service]


@pytest.fixture
def sweep(tmp_path: Path, make_sweep: MakeSweep) -> SweepPaths:
    """Three finished trials with complete adapters, and a running one."""
    states = {"a": ("COMPLETE", 0.5), "b": ("STOPPED", 0.3), "c": ("COMPLETE", 0.4), "d": ("RUNNING", 0.1)}
    paths = make_sweep(tmp_path / "s", states)
    for rank, trial in enumerate(states, 14):
        folder = paths.trial(trial).adapter(7)
        config = {"peft_type": "LORA", "base_model_name_or_path": "m", "r": rank, "rank_pattern": {"x": 2 * rank}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(b"")
    return paths


@pytest.fixture
def plan(sweep: SweepPaths) -> Iterator[Plan]:
    """Plans a service of this sweep on a free port: `plan(top=2)`."""
    with ExitStack() as ports:

        def make(**options: Any) -> Service:
            service = plan_service(**{"sweep_or_adapter": str(sweep.root), "port": 0, **options})
            ports.enter_context(service.listening)
            return service

        yield make


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command vllm on PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BaseSection(model="embedded"))


def test_the_best_adapter_also_has_the_name_of_its_sweep(plan: Plan, sweep: SweepPaths) -> None:
    assert plan().names == ["b", "s"]
    assert plan(top=2).names == ["b", "s", "c"]
    assert plan(top=9).names == ["b", "s", "c", "a"]
    adapter = sweep.trial("a").adapter(7)
    assert plan(sweep_or_adapter=str(adapter)).names == ["step-7"]
    with pytest.raises(RequestError, match="is a single adapter"):
        plan(sweep_or_adapter=str(adapter), top=2)
    with pytest.raises(RecordError, match="none: there is no such sweep or adapter"):
        plan(sweep_or_adapter="none")


def test_a_port_in_use_is_reported(plan: Plan) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"--port {port}: cannot listen on 127.0.0.1"):
            plan(port=port)
    with pytest.raises(RequestError, match=r"cannot listen on 192\.0\.2\.1"):
        plan(host="192.0.2.1")  # reserved for documentation


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost"])
def test_the_loopback_needs_no_token(plan: Plan, host: str) -> None:
    service = plan(host=host)
    assert (service.token, "token:" in service.describe(), "Bearer" in service.describe()) == (None, False, False)


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_a_public_address_gets_a_generated_token(plan: Plan, host: str) -> None:
    service, other = plan(host=host), plan(host=host)
    assert service.token is not None
    assert service.token != other.token
    description = service.describe()
    assert f"token:  {service.token} (generated for this server" in description
    assert f'-H "Authorization: Bearer {service.token}"' in description, "it is not in the environment"
    assert f"curl http://0.0.0.0:{service.listening.getsockname()[1]}/v1/chat" in description


def test_a_given_token_is_never_printed(plan: Plan) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        service = plan(host=host, token="secret-7")
        assert service.token == "secret-7"
        assert "secret-7" not in service.describe()
        assert "Bearer $ORCHESTRATOR_TOKEN" in service.describe()
    for token in ("", " x", "é", "a\nb"):
        with pytest.raises(RequestError, match="--token: must be"):
            plan(token=token)


def test_auto_gives_the_reason_for_transformers(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    service = plan()
    assert (service.engine, service.engine_reason) == (
        "transformers",
        "vLLM is not installed: there is no command vllm on PATH",
    )
    with pytest.raises(RequestError, match="--engine vllm: vLLM is not installed"):
        plan(engine="vllm")


@pytest.mark.usefixtures("vllm")
def test_vllm_is_chosen_only_if_it_can_serve_the_adapters(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(engine="vllm").engine == "vllm"
    with pytest.raises(RequestError, match="does not protect /invocations"):
        plan(engine="vllm", host="0.0.0.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (plan().engine, plan().engine_reason) == ("transformers", "there is no GPU")


@pytest.mark.usefixtures("vllm")
def test_vllm_is_not_used_for_float32_on_a_gpu(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = plan().served_adapters[0].adapter
    float32_adapter = replace(adapter, base=adapter.base.model_copy(update={"compute_dtype": "float32"}))
    for is_there, fault in ((False, None), (True, "vLLM's LoRA kernels on a GPU support only 16-bit types")):
        monkeypatch.setattr("torch.cuda.is_available", lambda is_there=is_there: is_there)
        assert _why_not_vllm([adapter], "127.0.0.1") is None
        assert (_why_not_vllm([float32_adapter], "127.0.0.1") or "").startswith(fault or "")
        assert bool(_why_not_vllm([float32_adapter], "127.0.0.1")) is is_there


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "fully trained modules"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trained tokens"),
        ({"target_parameters": ["experts.down_proj"]}, "adapted experts"),
        ({"peft_type": "IA3"}, "parts of IA3"),
        ({"init_lora_weights": "olora"}, "a base that was changed by olora"),
        ({"init_lora_weights": "pissa_niter_4"}, "a base that was changed by pissa_niter_4"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_vllm_is_not_used_for_more_than_plain_lora(
    plan: Plan, sweep: SweepPaths, config: dict[str, Any], words: str
) -> None:
    file = sweep.trial("b").adapter(7) / "adapter_config.json"
    plain = json.loads(file.read_text())
    for right in ({}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": True}):
        file.write_text(json.dumps(plain | right))
        assert plan(engine="vllm").engine == "vllm"
    file.write_text(json.dumps(plain | config))
    with pytest.raises(RequestError, match=f"vLLM supports plain LoRA, but b has {words}"):
        plan(engine="vllm")
    assert plan().engine == "transformers"


@pytest.mark.parametrize(
    ("config", "rank"), [({"r": 513, "rank_pattern": {}}, 513), ({"r": 8, "rank_pattern": {"x": 1024}}, 1024)]
)
@pytest.mark.usefixtures("vllm")
def test_vllm_is_not_used_for_ranks_above_its_largest(
    plan: Plan, sweep: SweepPaths, config: dict[str, Any], rank: int
) -> None:
    """The rank is checked before vLLM is chosen, as transformers can serve any rank."""
    file = sweep.trial("c").adapter(7) / "adapter_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"r": 512, "rank_pattern": {}}))
    command, _ = _vllm_call(plan(engine="vllm", top=2))
    assert dict(pairwise(command))["--max-lora-rank"] == "512"
    file.write_text(json.dumps(plain | config))
    with pytest.raises(
        RequestError, match=f"--engine vllm: vLLM supports adapters up to rank 512, but c has rank {rank}"
    ):
        plan(engine="vllm", top=2)
    service = plan(top=2)
    assert (service.engine, service.engine_reason) == (
        "transformers",
        f"vLLM supports adapters up to rank 512, but c has rank {rank}",
    )


@pytest.mark.usefixtures("vllm")
def test_the_token_is_not_on_vllms_command_line(plan: Plan) -> None:
    command, environment = _vllm_call(plan(engine="vllm", top=2, token="secret-7"))
    assert environment["VLLM_API_KEY"] == "secret-7"
    assert "secret-7" not in " ".join(command)


def test_the_vllm_command_describes_base_and_adapters(sweep: SweepPaths, tokenizer: Any) -> None:
    base = BaseSection(model="owner/name", revision="v1", compute_dtype="float16")
    adapters = {name: sweep.trial(name).adapter(7) for name in ("a", "b")}
    command = vllm_command(base, adapters, PromptForm(tokenizer, None), "127.0.0.1", 8000)
    assert command[:3] == ["vllm", "serve", "owner/name"]
    options = dict(pairwise(command))
    assert options["--quantization"] == "bitsandbytes"
    assert (options["--dtype"], options["--revision"]) == ("float16", "v1")
    assert (options["--max-loras"], options["--max-lora-rank"]) == ("2", "32")  # 2 * 15 is 30
    at = command.index("--lora-modules")
    modules = [json.loads(module) for module in command[at + 1 : at + 3]]
    assert modules == [{"name": name, "path": str(path)} for name, path in adapters.items()]
    assert "--trust-remote-code" not in command
    plain = vllm_command(BaseSection(model="m", quantization="none"), adapters, PromptForm(tokenizer, None), "::1", 0)
    assert "--quantization" not in plain


@pytest.mark.parametrize(
    "template",
    [
        "<s>[INST] {question} [/INST] {answer} </s>",
        "{question} {answer}",
        "Q: \"{question}\"\n{{'é😀' }}}}\n A:\t{answer}",
        "### {{% raw %}}\\n{question}{answer}",
        "Q: {question}\nagain {question}\nA: {answer}",
        "{question}{question} '{{{question}}}' {question} {answer}",
        None,
    ],
)
def test_the_chat_template_for_vllm_gives_the_prompt_of_the_training_rows(template: str | None) -> None:
    tokenizer = load_tokenizer(BaseSection(model="embedded"))
    tokenizer.chat_template = None
    data = DataSection(source="embedded", format="template", template=template) if template else None
    form = PromptForm(tokenizer, data)
    chat_template = question_template(form)
    assert "\n" not in chat_template
    for question in ("What is 1 and 2? ", " a {{ b }} 'c' \\n\n", '"'):
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == form.ids(question)
        assert question.strip() in tokenizer.decode(form.ids(question))


def pieces(stream: _TextStream, tokenizer: Any, text: str) -> list[str]:
    """Return the pieces taken after each token of `text`, up to a stop string, and then the rest."""
    out = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        stopped = stream.add(token)
        out.append(stream.take_settled())
        if stopped:
            break
    return [*out, stream.take_rest()]


def test_text_that_may_become_a_stop_string_is_held_back(tokenizer: Any) -> None:
    out = pieces(_TextStream(tokenizer, ["9 8 7", "no"], strip=False), tokenizer, " 1 9 8 2 9 8 7 6")
    assert "".join(out) == " 1 9 8 2 "
    so_far = ["".join(out[: i + 1]) for i in range(len(out))]
    assert not any(text.endswith("2 9") for text in so_far)
    assert "".join(pieces(_TextStream(tokenizer, ["9 8 7"], strip=False), tokenizer, "1 9 8")) == "1 9 8"


def test_outer_whitespace_is_stripped(tokenizer: Any) -> None:
    out = pieces(_TextStream(tokenizer, [], strip=True), tokenizer, "  1 \n 2  ")
    assert "".join(out) == "1 \n 2"
    assert "".join(pieces(_TextStream(tokenizer, [], strip=False), tokenizer, " 1 ")) == " 1 "


def test_a_character_of_several_tokens_is_not_split(tokenizer: Any) -> None:
    ids = tokenizer("é😀", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    out = pieces(_TextStream(tokenizer, [], strip=False), tokenizer, "é😀")
    assert "".join(out) == "é😀"
    assert "�" not in "".join(out)


@pytest.mark.usefixtures("vllm")
def test_vllm_uses_the_adapters_stop_tokens(plan: Plan, sweep: SweepPaths) -> None:
    folder = sweep.trial("b").adapter(7)
    assert "--generation-config" not in _vllm_call(plan(engine="vllm"))[0], "vLLM then reads the base's file"
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    command = _vllm_call(plan(engine="vllm"))[0]
    assert command[command.index("--generation-config") + 1] == str(folder.resolve())
