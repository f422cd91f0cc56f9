"""Export a trained adapter in every format, load it with plain libraries, and compare it with its source."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import DEMO, TINY, Witness
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.adapters.bundle import verify
from orchestrator.data import load
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.dtypes import Dtype
from orchestrator.deploy.export import export as export_module
from orchestrator.deploy.export.export import ExportResult, export
from orchestrator.deploy.export.gguf import CONVERTER, FILE, load_gguf
from orchestrator.deploy.export.merge import Merge, Onto, plan_merge
from orchestrator.deploy.find import find_adapter
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import ExportError, RequestError
from orchestrator.record import SweepPaths
from orchestrator.spec import load_spec
from orchestrator.spec.sections import BaseSection
from orchestrator.training.local import run_local_trial

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]

needs_ray_serve = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import ray.serve"], capture_output=True).returncode != 0,
    reason="Ray Serve is not installed (the extra ray-serve)",
)
needs_converter = pytest.mark.skipif(
    not (shutil.which(CONVERTER) or (Path(os.environ.get("LLAMA_CPP", "")) / CONVERTER).is_file()),
    reason=f"llama.cpp's {CONVERTER} is not installed",
)


WAYS: list[tuple[Dtype, Onto, float]] = [
    ("fp16", "dequantized", 0.01),
    ("bf16", "original", 0.05),
    ("fp16", "original", 0.01),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    """An adapter trained for some steps."""
    paths = SweepPaths(tmp_path_factory.mktemp("runs") / "tiny")
    settings = [
        "training.steps=60",
        "training.eval_steps=60",
        "scheduler={kind: asha, grace_steps: 60, reduction_factor: 2}",
    ]
    run_local_trial(load_spec(DEMO, [*TINY, *settings]), paths, Witness())
    return find_adapter(str(paths.root), "runs")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A target folder. The test fails if anything is left beside it."""
    yield tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


def assert_sealed(done: ExportResult, **how: str) -> None:
    manifest = verify(done.folder)
    assert manifest.facts.format == done.format
    assert manifest.facts.parity == how | done.parity.as_dict()
    assert manifest.facts.config is not None
    assert manifest.facts.data_fingerprint is not None
    assert sorted([*manifest.files, "manifest.json"]) == done.files
    assert done.num_bytes == sum((done.folder / name).stat().st_size for name in done.files)
    assert all((done.folder / name).stat().st_mode & 0o777 == 0o644 for name in done.files)


PLAIN = """
import json, sys
sys.modules["orchestrator"] = None  # it cannot be imported
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, kind, rows = sys.argv[1], sys.argv[2], json.loads(open(sys.argv[3]).read())
model = (AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM).from_pretrained(folder)
loss = tokens = 0
for row in rows:
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    here = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        loss += model(input_ids=ids, labels=labels).loss.item() * here
    tokens += here
print(json.dumps({"loss": loss / tokens, "template": bool(AutoTokenizer.from_pretrained(folder).chat_template)}))
"""


def plain(folder: Path, kind: str, adapter: AdapterRef, rows_file: Path) -> dict[str, Any]:
    """Load an export with plain libraries, in a process without this package. Returns the loss of the compared rows."""
    assert adapter.sweep is not None
    rows_file.write_text(json.dumps(list(load(adapter.sweep.data).held_out.select(range(20)))))
    command = [sys.executable, "-c", PLAIN, str(folder), kind, str(rows_file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_an_exported_adapter_is_identical_on_its_base(
    adapter: AdapterRef, out: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines: list[str] = []
    done = export(adapter, out, "adapter", say=lines.append)
    assert done.parity.max_logit_difference == 0
    assert done.parity.loss_exported == done.parity.loss_source < 3
    assert done.parity.num_rows == 20
    assert str(done.parity) in lines
    assert_sealed(done)
    on_original = plain(out, "adapter", adapter, tmp_path_factory.mktemp("rows") / "rows.json")
    assert on_original["template"]
    assert on_original["loss"] == pytest.approx(done.parity.loss_source, rel=0.2), (
        "on the 16-bit base, not the 4-bit one"
    )


def test_plain_transformers_loads_a_merged_model(
    adapter: AdapterRef, out: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out.mkdir()  # an empty folder is a valid target
    done = export(adapter, out, "merged")
    assert 0 < done.parity.max_logit_difference < 0.05 * done.parity.largest_logit
    assert_sealed(done, dtype="bf16", onto="dequantized")
    said = plain(out, "merged", adapter, tmp_path_factory.mktemp("rows") / "rows.json")
    assert said["template"]
    assert said["loss"] == pytest.approx(
        done.parity.loss_exported, rel=2e-3
    )  # plain transformers sums in another order


def test_each_kind_of_merge_is_compared_with_its_own_source(adapter: AdapterRef, tmp_path: Path) -> None:
    sources = {}
    for dtype, onto, most in WAYS:
        done = export(adapter, tmp_path / f"{dtype}-{onto}", "merged", dtype, onto)
        assert done.parity.max_logit_difference < most * done.parity.largest_logit
        assert_sealed(done, dtype=dtype, onto=onto)
        sources[onto] = done.parity.loss_source
    # The sources differ by the quantization error, so a comparison with the wrong one would be out of tolerance.
    assert sources["dequantized"] != pytest.approx(sources["original"], rel=1e-3)


def test_an_adapter_on_an_unquantized_base(adapter: AdapterRef, out: Path) -> None:
    plain_base = adapter.base.model_copy(update={"quantization": "none"})
    assert export(replace(adapter, base=plain_base), out, "adapter").parity.max_logit_difference == 0


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1, float("nan")])  # 0: the adapter is left out
def test_an_export_out_of_tolerance_is_rejected_and_leaves_nothing_behind(
    adapter: AdapterRef, out: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def plan(*arguments: Any) -> Merge:
        merge = plan_merge(*arguments)
        wrong = {name: replace(update, scale=update.scale * factor) for name, update in merge.updates.items()}
        return replace(merge, updates=wrong)

    monkeypatch.setattr(export_module, "plan_merge", plan)
    with pytest.raises(ExportError, match="does not answer as the adapter does: logits differ by") as caught:
        export(adapter, out, "merged")
    assert caught.value.exit_code == 1
    assert not out.exists()


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_a_disk_that_fills_up_leaves_nothing_behind(adapter: AdapterRef, out: Path, format: Any) -> None:
    """A file size limit of 100 kB simulates a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RequestError, match=r"out: cannot be written: .*File too large") as caught:
            export(adapter, out, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.remedy.startswith("This export needs 0.0")
    assert not out.exists()


@needs_ray_serve
def test_a_ray_serve_config_refers_to_the_model_next_to_it(adapter: AdapterRef, out: Path) -> None:
    import yaml

    done = export(adapter, out, "ray-serve", "fp16")
    assert_sealed(done, dtype="fp16", onto="dequantized")
    (application,) = yaml.safe_load((out / "serve.yaml").read_text())["applications"]
    (llm,) = application["args"]["llm_configs"]
    model = Path(llm["model_loading_config"]["model_source"])
    assert model == out.resolve() / "model"
    assert LlamaForCausalLM.from_pretrained(model).dtype == torch.float16
    assert llm["engine_kwargs"]["dtype"] == "float16"


def llama_like(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of a kind that llama.cpp supports: that of Llama 2, with byte fallback."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned = Tokenizer(models.BPE())
    learned.normalizer = spaces
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size - 260, show_progress=False))
    found = json.loads(learned.to_str())["model"]
    names = [*special, *(f"<0x{i:02X}>" for i in range(256)), *found["vocab"]]
    names += [f"filler{i}" for i in range(size - len(names))]
    ids = {name: i for i, name in enumerate(names)}
    merges = [(one, other) for one, other in found["merges"]]
    whole = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    whole.normalizer = spaces
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names_of = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **names_of)


def by_hand(work: Path, tokenizer: Any) -> tuple[AdapterRef, Path]:
    """Make the embedded base with another tokenizer, an adapter without trial.json, and rows."""
    model = LlamaForCausalLM.from_pretrained(BASE_DIR)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(work / "adapter")
    (work / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    base = BaseSection(model=str(work / "base"), compute_dtype="float32")
    return AdapterRef("adapter", work / "adapter", base, None, None), work / "rows.jsonl"


TEXTS = [f"What is the total of {i} and {i + 7}?" for i in range(20)]


@needs_converter
@pytest.mark.parametrize(("dtype", "onto"), [("bf16", "dequantized"), ("fp16", "original")])
def test_transformers_reads_the_file_of_llama_cpps_converter(
    tmp_path_factory: pytest.TempPathFactory, out: Path, dtype: Any, onto: Any
) -> None:
    adapter, rows = by_hand(tmp_path_factory.mktemp("work"), llama_like(TEXTS, 512))
    done = export(adapter, out, "gguf", dtype, onto, data=rows)
    assert done.files == ["manifest.json", FILE]
    from gguf import GGUFReader

    held = {tensor.tensor_type.name for tensor in GGUFReader(out / FILE).tensors}
    assert held == {"F32", "BF16" if dtype == "bf16" else "F16"}, "one-dimensional weights and matrices"
    assert 0 < done.parity.max_logit_difference < 0.05 * done.parity.largest_logit
    assert verify(out).facts.parity == {"dtype": dtype, "onto": onto} | done.parity.as_dict()


@pytest.fixture(scope="module")
def as_gguf(adapter: AdapterRef, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export(adapter, tmp_path_factory.mktemp("gguf") / "out", "gguf", "bf16")


@needs_converter
def test_the_gguf_file_equals_the_merged_model_to_the_bit(
    adapter: AdapterRef, as_gguf: ExportResult, out: Path
) -> None:
    from gguf import GGUFReader

    merged = export(adapter, out, "merged", "bf16")
    assert as_gguf.parity == merged.parity
    wanted = LlamaForCausalLM.from_pretrained(out).state_dict()
    read = load_gguf(as_gguf.folder, "bf16", {"": "cpu"}).state_dict()
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    fields = GGUFReader(as_gguf.folder / FILE).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["general.name"].contents() == adapter.name


@needs_converter
def test_llama_cpp_tokenizes_like_the_tokenizer_and_answers_like_the_merged_model(
    adapter: AdapterRef, as_gguf: ExportResult, out: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    export(adapter, out, "merged", "bf16")
    tokenizer, model = AutoTokenizer.from_pretrained(out), LlamaForCausalLM.from_pretrained(out)
    llama = llama_cpp.Llama(str(as_gguf.folder / FILE), n_ctx=64, logits_all=True, verbose=False)
    prompt = "<s>[INST] What is the total of 12 and 45? [/INST]"
    for text in (prompt, " a  b\n\n 3.14 ² Ⅳ ½ don't 'RE é😀 工作\t", "x\t\ty  \n z   ", "12345 a1b2 !!??..."):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    llama.eval(ids)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].float()
    said = torch.tensor(llama.scores[: len(ids)])
    assert (said - wanted).abs().max() < 0.05 * wanted.abs().max()


@needs_converter
def test_the_converters_message_on_an_unsupported_tokenizer_is_passed_on(
    tmp_path_factory: pytest.TempPathFactory, out: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    adapter, rows = by_hand(tmp_path_factory.mktemp("work"), tokenizer)
    with pytest.raises(RequestError, match="BPE pre-tokenizer was not recognized") as caught:
        export(adapter, out, "gguf", data=rows)
    assert "--format merged" in caught.value.remedy
    assert not out.exists()


MEASURE = """
import sys
from pathlib import Path
from orchestrator.deploy.export.merge import plan_merge
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.spec.sections import BaseSection

def memory(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))

def merge(base, adapter, target):
    target.mkdir()
    plan = plan_merge(AdapterRef("adapter", adapter, BaseSection(model=str(base)), None, None), "bf16", "dequantized")
    plan.write(target, shard_bytes=8 << 20)
    return plan.num_bytes

work = Path(sys.argv[1])
merge(work / "small", work / "small-adapter", work / "small-merged")  # loads the libraries
before = memory("VmHWM")
num_bytes = merge(work / "large", work / "large-adapter", work / "large-merged")
print(num_bytes, memory("VmHWM") - before)
"""


def test_a_merge_takes_the_memory_of_two_shards_for_any_model_size(tmp_path: Path) -> None:
    for name, layers in (("small", 1), ("large", 48)):
        shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": layers}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape)).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(BASE_DIR / file, tmp_path / name / file)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path / f"{name}-adapter")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    model_bytes, grown = map(int, done.stdout.split()[-2:])
    assert model_bytes > 240 << 20
    assert grown < model_bytes / 2
