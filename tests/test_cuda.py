"""What only a GPU can show: the CPU's numbers on CUDA, and every command from data to merged model.

Skipped where there is no GPU. ``make gpu-tests`` runs it on one; with ``--device cpu`` the same
code runs on the CPU, so that no mistake of writing waits for the first GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from conftest import GOLDEN, HYBRID, MATRIX, SIGLIP, VL2_MLA, make_rows
from conftest import write_jsonl as write
from safetensors.torch import load_file
from test_experts import HIDDEN, run, sparse_mlp, tuned
from test_golden import cases_of, in_mode, row_of, rows_of
from test_golden import load_file as load_case
from tolerances import difference
from torch._dynamo.testing import CompileCounter

import vlft
from vlft.checkpoints.load import load_model
from vlft.checkpoints.placement import resolve_placement
from vlft.checkpoints.quantize import quantized_weight
from vlft.checkpoints.runs import find_checkpoint
from vlft.errors import VlftError
from vlft.models.compiled import compile_layers
from vlft.packing.prefix_tree import pack
from vlft.training import loop
from vlft.training.lora import LoraOptions, add_lora
from vlft.training.loss import PackedLoss
from vlft.training.model import set_checkpointing
from vlft.vision.encode import moved, pixels_of

pytestmark = pytest.mark.cuda
# Those of torch's compiler.
OF_TRACING = pytest.mark.filterwarnings("ignore")
# Largest relative difference: float32 with another order of sums, and bfloat16.
FLOAT32, BFLOAT16 = 1e-4, 2e-2


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def on(device):
    """A function that loads a golden checkpoint on the device, as the commands do."""

    def load(folder, dtype: str = "float32", attn: str = "auto", quantize: str = "none"):
        options = {"dtype": dtype, "device": device.type, "quantize": quantize}
        return load_model(folder, resolve_placement(attn=attn, **options))

    return load


def assert_near(found, expected, bound: float) -> None:
    if isinstance(found, torch.Tensor):
        found = found.cpu()
    apart, where = difference(found, expected)
    assert apart <= bound, f"they differ by {apart:.1e}{where}, the bound is {bound:.0e}"


def loss_and_gradients(model, folder, row, images):
    """Of a row, as training computes them."""
    device = next(model.parameters()).device
    half = next(model.parameters()).dtype == torch.bfloat16
    objective = PackedLoss(model, folder.family)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        loss = objective(row.to(device), images.to(device)) / row.weight.sum().item()
    loss.backward()
    named = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), named


@pytest.mark.parametrize(("case", "path"), cases_of("single"), indirect=["case"])
def test_golden_logits(case, path, folder, on):
    expected = load_case(path.with_suffix(".safetensors"))
    data = json.loads(path.read_text("utf-8"))
    if "logits_last4" not in expected:
        pytest.skip("not stored")
    processor = in_mode(folder, data.get("mode"))
    inputs = processor.collate([processor.encode(row_of(data["conversation"], data), GOLDEN)])
    del inputs["labels"]
    model = on(folder)
    with torch.no_grad():
        found = model(**moved(inputs, next(model.parameters()))).logits
    assert_near(found[:, -4:, ::4], expected["logits_last4"], FLOAT32)


@pytest.mark.parametrize(("case", "path"), cases_of("single"), indirect=["case"])
def test_golden_features(case, path, folder, on):
    expected = load_case(path.with_suffix(".safetensors"))
    data = json.loads(path.read_text("utf-8"))
    stored = any(name.startswith("image_embeds") for name in expected)
    if not stored or case.family == "deepseek_vl2":
        pytest.skip("not stored, or without the separators that vlft adds")
    processor = in_mode(folder, data.get("mode"))
    sample = processor.encode(row_of(data["conversation"], data), GOLDEN)
    model = on(folder)
    inputs = moved(processor.image_inputs(sample.images), next(model.parameters()))
    with torch.no_grad():
        features = processor.family.vision_features(model, inputs)
        features = processor.family.align(model, features, [(0, 0)])
    found, wanted = rows_of(features.cpu(), expected, "image_embeds")
    assert_near(found, wanted, FLOAT32)


@pytest.mark.parametrize(("case", "path"), cases_of("train"), indirect=["case"])
def test_golden_loss_and_gradients(case, path, folder, on):
    data = json.loads(path.read_text("utf-8"))
    processor = in_mode(folder, data.get("mode"))
    sample = processor.encode(row_of(data["conversation"], data), GOLDEN)
    row = pack([sample], processor.chat.image_token_id)
    model = on(folder).requires_grad_(True)
    images = pixels_of(row.images, processor)
    loss, native = loss_and_gradients(model, folder, row, images)
    assert_near(loss, data["loss"], FLOAT32)
    for name, norm in data["grad_norms"].items():
        match = folder.family.keys.from_original(name)
        gradient = match.to_original([native[part] for part in match.native])
        # A scalar's gradient is a sum of many values that nearly cancel.
        bound = 10 * FLOAT32 if gradient.numel() == 1 else 3 * FLOAT32
        assert_near(gradient.double().norm().item(), norm, bound)


@pytest.mark.parametrize("case", MATRIX, indirect=True, ids=str)
def test_half_precision(case, folder, processor, on):
    """The loss in bfloat16, against that in float32."""
    row = pack(
        [processor.encode(make_rows(5, case)[0], GOLDEN / "images")], processor.chat.image_token_id
    )
    images = pixels_of(row.images, processor)
    losses = [
        loss_and_gradients(tuned_model(on(folder, dtype), folder), folder, row, images)[0]
        for dtype in ("float32", "bfloat16")
    ]
    assert_near(losses[1], losses[0], BFLOAT16)


def tuned_model(model, folder):
    """With LoRA on all layers whose B is not zero."""
    torch.manual_seed(0)
    add_lora(model, folder.family, LoraOptions("ALL", rank=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape)).to(parameter.device)
    return model


@pytest.mark.parametrize(
    ("attn", "checkpointing"), [("auto", False), ("flex", False), ("flex", True), ("eager", False)]
)
@pytest.mark.parametrize("case", [SIGLIP, HYBRID, VL2_MLA], indirect=True, ids=str)
def test_packed_is_single(case, folder, processor, on, device, attn, checkpointing):
    if (device.type, attn) == ("cpu", "flex"):
        pytest.skip("FlexAttention has no backward pass on the CPU")
    rows = make_rows(8 if case is SIGLIP else 5, case)
    samples = [processor.encode(row, GOLDEN / "images") for row in rows]
    token = processor.chat.image_token_id
    whole = pack(samples, token)
    model = tuned_model(on(folder, attn=attn), folder).train()
    set_checkpointing(model, on=checkpointing)
    loss, gradients = loss_and_gradients(model, folder, whole, pixels_of(whole.images, processor))
    model.zero_grad()
    total = 0.0
    for row in (pack([sample], token) for sample in samples):
        share = row.weight.sum() / whole.weight.sum()
        found = PackedLoss(model, folder.family)(
            row.to(device), pixels_of(row.images, processor).to(device)
        )
        (found / row.weight.sum().item() * share.item()).backward()
        total += found.item() / whole.weight.sum().item()
    assert_near(loss, total, FLOAT32)
    alone = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    assert_near(gradients, alone, 3 * FLOAT32)


@pytest.fixture
def compile_strictly(folder):
    """A function that compiles a model's layers, after which an error of the compiler is one."""

    def compile_it(model, backend="inductor"):
        torch._dynamo.reset()
        compile_layers(model.get_submodule(folder.family.parts.language), backend)
        torch._dynamo.config.suppress_errors = False

    with torch._dynamo.config.patch(suppress_errors=False):
        yield compile_it
    torch._dynamo.reset()


@OF_TRACING
@pytest.mark.parametrize(
    ("case", "quantize"),
    [(SIGLIP, "none"), (VL2_MLA, "none"), (SIGLIP, "nf4")],
    indirect=["case"],
    ids=str,
)
def test_compiled_layers_compute_the_same(
    case, folder, processor, on, device, quantize, compile_strictly
):
    """Without and with gradient checkpointing, on rows of two lengths; the last layer narrowed."""
    samples = [processor.encode(row, GOLDEN / "images") for row in make_rows(5, case)]
    rows = [pack(part, processor.chat.image_token_id) for part in (samples, samples[:2])]
    model = tuned_model(on(folder, quantize=quantize), folder)
    objective = PackedLoss(model, folder.family).train()

    def found(row):
        model.zero_grad()
        loss = objective(row.to(device), pixels_of(row.images, processor).to(device))
        loss.backward()
        trained = model.named_parameters()
        return loss.item(), {n: p.grad.cpu() for n, p in trained if p.grad is not None}

    expected = [found(row) for row in rows]
    compile_strictly(model)
    for checkpointing in (False, True):
        set_checkpointing(model, on=checkpointing)
        for row, (loss, gradients) in zip(rows, expected, strict=True):
            compiled = found(row)
            assert_near(compiled[0], loss, FLOAT32)
            assert_near(compiled[1], gradients, 3 * FLOAT32)


@OF_TRACING
@pytest.mark.parametrize("case", [SIGLIP], indirect=True, ids=str)
def test_compiled_layers_share_their_code(case, folder, processor, on, device, compile_strictly):
    """torch stops compiling at a limit of versions; more layers than that must share theirs."""
    samples = [processor.encode(row, GOLDEN / "images") for row in make_rows(5, case)]
    rows = [pack(part, processor.chat.image_token_id) for part in (samples, samples[:2])]
    counts = []
    # The first layer's input has no gradient, so that there are two versions.
    for layers in (2, torch._dynamo.config.recompile_limit + 2):
        model = on(folder)
        language = model.get_submodule(folder.family.parts.language)
        copies = [copy.deepcopy(language.layers[0]) for _ in range(layers)]
        for module in (module for made in copies for module in made.modules()):
            if hasattr(module, "config"):
                module.config = language.config
        language.layers = torch.nn.ModuleList([*copies, language.layers[-1]])
        language.config.num_hidden_layers = layers + 1
        objective, counter = PackedLoss(tuned_model(model, folder), folder.family), CompileCounter()
        compile_strictly(model, counter)
        for row in rows:
            objective(row.to(device), pixels_of(row.images, processor).to(device))
            counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    assert counts[0] > 0


@pytest.mark.parametrize("rank", [3, 8])
def test_grouped_experts_are_a_loop(device, rank):
    """LoRA on experts, output and gradients; peft's own on the CPU is the reference."""
    hidden = torch.randn(20, HIDDEN)
    expected = run(tuned(sparse_mlp(), grouped=False, rank=rank), hidden)
    found = run(tuned(sparse_mlp(), grouped=True, rank=rank).to(device), hidden.to(device))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert_near(ours, theirs, FLOAT32)
    assert_near({n: g.cpu() for n, g in found[2].items()}, expected[2], FLOAT32)


def test_nf4_codes(device):
    """The CPU's codes and scales: a run may be planned or merged on another device."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    tensor = torch.randn(128, 256)
    layers = [bnb.nn.Linear4bit(256, 128, bias=False, quant_type="nf4") for _ in range(2)]
    cpu, there = (
        quantized_weight(layer, tensor, place)
        for layer, place in zip(layers, (torch.device("cpu"), device), strict=True)
    )
    assert torch.equal(cpu.data.flatten(), there.data.cpu().flatten())
    assert torch.equal(cpu.quant_state.absmax, there.quant_state.absmax.cpu())


@pytest.fixture
def config(device, tmp_path):
    return vlft.SftConfig(
        model=str(SIGLIP.folder), device=device.type, dtype="float32",
        dataset=(str(write(tmp_path / "train.jsonl", make_rows(10))),),
        image_root=GOLDEN / "images", val_ratio=0.2, output_dir=tmp_path / "output",
        batch_size=2, num_train_epochs=1, save_steps=2, learning_rate=1e-2, show_sample=False,
    )  # fmt: skip


def adapter(run):
    return load_file(find_checkpoint(run) / "adapter_model.safetensors")


def losses(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_from_data_to_a_merged_model(config, device, tmp_path):
    result = vlft.sft(dataclasses.replace(config, num_train_epochs=4))
    found = losses(result.run)
    assert found[-1] < found[0]
    infer = vlft.InferConfig(
        ckpt_dir=result.checkpoint, device=device.type, dataset=config.dataset,
        image_root=config.image_root, batch_size=4, max_new_tokens=8,
    )  # fmt: skip
    replies = [
        [row["response"] for row in vlft.infer(one).rows]
        for one in (infer, dataclasses.replace(infer, merge_lora=True))
    ]
    assert replies[0] == replies[1]
    merged = vlft.merge_lora(
        vlft.MergeLoraConfig(
            ckpt_dir=result.checkpoint, device=device.type, output_dir=tmp_path / "merged"
        )
    )
    assert merged.difference < FLOAT32


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_run(config, quantize):
    """It has no loss of another dtype to compare with; it must learn."""
    changed = dataclasses.replace(config, quantize=quantize, dtype="auto", num_train_epochs=4)
    found = losses(vlft.sft(changed).run)
    assert found[-1] < found[0]


def test_float16_with_a_scaler(config, device):
    """What a card without bfloat16 trains in: T4 and V100."""
    if device.type == "cpu":
        pytest.skip("gradients are scaled on a GPU alone")
    found = losses(vlft.sft(dataclasses.replace(config, dtype="float16", num_train_epochs=4)).run)
    assert found[-1] < found[0]


def test_resume(config, device, monkeypatch):
    """As a run that never stopped; bit for bit on the CPU, on CUDA as close as two whole runs."""
    whole = adapter(vlft.sft(config).run)
    taken = []
    original = loop.take_step

    def take_step(job, rows):
        if len(taken) == 2:
            raise VlftError("killed")
        taken.append(1)
        return original(job, rows)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", take_step)
        with pytest.raises(VlftError, match="killed"):
            vlft.sft(dataclasses.replace(config, output_dir=config.output_dir.with_name("cut")))
    (cut,) = (config.output_dir.with_name("cut") / SIGLIP.checkpoint).iterdir()
    resumed = adapter(vlft.sft(vlft.SftConfig(resume=cut)).run)
    for name, tensor in whole.items():
        if device.type == "cpu":
            assert torch.equal(resumed[name], tensor)
        assert_near(resumed[name], tensor, 1e-2)


def test_checkpointing_changes_nothing(config):
    changes = [{"gradient_checkpointing": on} for on in (False, True)]
    first, second = (losses(vlft.sft(dataclasses.replace(config, **c)).run) for c in changes)
    assert_near(second, first, FLOAT32)


def test_out_of_memory_is_told(config, device, monkeypatch):
    """Wherever it happens: while the model is loaded, and in a row."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-5)
    else:

        def full(*_args, **_kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr("vlft.checkpoints.load._place", full)
    try:
        with pytest.raises(VlftError, match="out of memory") as caught:
            vlft.sft(config)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert "--quantize nf4" in str(caught.value)


def test_no_kernel_is_searched_for_per_shape(device):
    """Rows have new lengths at nearly every step, replies at every token."""
    resolve_placement(dtype="auto", device=device.type, quantize="none")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32
