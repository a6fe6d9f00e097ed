"""Students made of the teacher's layers: same weights, a configuration that is true, generation that works."""

import copy

import pytest
import torch
from torch import nn

from lightning_distill.layer_maps import architecture_plan, build_student, find_stack
from lightning_distill.networks import ConvNet1d, from_config

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60, "pad_token_id": 0}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "bert": ("sequence-classification", SMALL | {"num_hidden_layers": 6}),
    "gpt2": ("causal-lm", TOKENS | {"n_embd": 16, "n_layer": 6, "n_head": 2, "vocab_size": 60, "pad_token_id": 0}),
    "llama": ("causal-lm", SMALL | TOKENS | {"num_hidden_layers": 6}),
    "qwen2": ("causal-lm", SMALL | TOKENS | {"num_hidden_layers": 6, "num_key_value_heads": 1,
                                             "use_sliding_window": True, "sliding_window": 4,
                                             "layer_types": ["full_attention", "sliding_attention"] * 3}),
}  # fmt: skip


@pytest.fixture(params=list(MODELS))
def teacher(request):
    return from_config(request.param, *MODELS[request.param]).eval()


@pytest.mark.chapter("B34", api="lightning_distill.layer_maps.architecture_plan")
def test_plan_golden(golden):
    case = golden("progressive_architecture_plan")
    depths = case.inputs["depths"].int().tolist()
    plan = architecture_plan(depths)
    assert [[s.teacher_depth, s.student_depth] for s in plan] == case.expected["stages"].int().tolist()
    assert [list(s.kept) for s in plan] == [[int(k) for k in kept] for kept in case.expected["kept_one_based"]]


@pytest.mark.chapter("B34", api="lightning_distill.layer_maps.build_student")
def test_a_student_has_the_kept_layers_and_everything_else(teacher):
    stack = find_stack(teacher)
    before = copy.deepcopy(teacher.state_dict())
    student = build_student(teacher, [2, 4, 6])
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == 3
    assert teacher.config.num_hidden_layers == 6
    expected = {}
    for name, value in before.items():
        if name.startswith(f"{stack}."):
            number, _, rest = name.removeprefix(f"{stack}.").partition(".")
            if int(number) % 2 == 1:
                expected[f"{stack}.{int(number) // 2}.{rest}"] = value
        else:
            expected[name] = value
    state = student.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)  # shares nothing with the teacher
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_configuration_builds_the_same_network_and_the_folder_loads(teacher, tmp_path):
    student = build_student(teacher.requires_grad_(False), [1, 4, 6]).eval()
    student.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path).eval()
    tokens = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, student(tokens).logits)
    if hasattr(student.config, "layer_types") and teacher.config.model_type == "qwen2":
        assert student.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_generation_with_the_cache_is_generation_without(name):
    student = build_student(from_config(name, *MODELS[name]), [2, 5, 6]).eval()
    tokens = torch.randint(3, 60, (2, 7))
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    cached = student.generate(tokens, use_cache=True, **arguments)
    assert torch.equal(cached, student.generate(tokens, use_cache=False, **arguments))


def test_all_layers_give_the_teacher_itself(teacher):
    tokens = torch.randint(3, 60, (2, 7))
    student = build_student(teacher, range(1, 7)).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits)


def test_networks_without_a_configuration():
    network = nn.Sequential()
    network.add_module("blocks", nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
    student = build_student(network, [1, 4])
    assert len(student.blocks) == 2
    assert torch.equal(student.blocks[1].weight, network.blocks[3].weight)
    listed = nn.Module()
    listed.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    assert torch.equal(build_student(listed, [3]).layers[0].weight, listed.layers[2].weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_student(nn.Linear(2, 2), [1]), "Linear has no list, where one was looked for"),
        (lambda: build_student(ConvNet1d(), [4]), "ascending layer numbers from 1 to 3, the length of 'blocks', got"),
        (lambda: build_student(ConvNet1d(), [2, 1]), "ascending layer numbers"),
        (lambda: build_student(ConvNet1d(), []), "ascending layer numbers"),
        (lambda: build_student(ConvNet1d(), [1], stack="head"), "got 'head'; it has 'blocks'"),
        (lambda: find_stack(from_config("t5", "seq2seq-lm", {"num_layers": 2, "d_model": 8, "d_ff": 8})), "2 lists"),
        (lambda: architecture_plan([6, 6]), "strictly decreasing numbers of layers, got"),
        (lambda: architecture_plan([6]), "at least two strictly decreasing"),
    ],
)
def test_bad_input(make, message, monkeypatch):
    if "2 lists" in message:
        import transformers

        config = transformers.T5Config(num_layers=2, d_model=8, d_ff=8, d_kv=4, num_heads=2, vocab_size=20)
        network = transformers.T5ForConditionalGeneration(config)
        with pytest.raises(ValueError, match=r"2 lists \('encoder.block', 'decoder.block'\)"):
            find_stack(network)
        return
    with pytest.raises(ValueError, match=message):
        make()
