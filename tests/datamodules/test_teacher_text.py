"""Training texts that a teacher has written."""

from itertools import pairwise

import pytest
import torch

from lightning_distill import KD
from lightning_distill.datamodules import TeacherTextDataModule, TextDataModule
from lightning_distill.datamodules.teacher_text import WrittenBlocks, beginnings
from lightning_distill.networks import from_config
from lightning_distill.tasks import CausalLM


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = {"vocab_size": 300, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return from_config("gpt2", "causal-lm", config | {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3})


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph number {i}: {i * i}, {i + 7} and more." for i in range(400)))
    return path


def data_module(file, teacher=None, **more):
    arguments = {"prompt": 6, "texts": 20, "strategy": "top_k", "num": 2, "length": 16, "batch_size": 4}
    arguments |= {"files": [str(file)], "vocab_size": 300} | more
    return TeacherTextDataModule(gpt2() if teacher is None else teacher, **arguments)


def test_texts_begin_as_paragraphs_do_and_go_on_as_the_teacher_says(file):
    data = data_module(file)
    data.prepare_data()
    data.setup("fit")
    plain = TextDataModule([file], vocab_size=300, length=16)
    paragraphs = plain.tokenizer.decode(plain.blocks.train.tokens.flatten()).split("<|endoftext|>")
    tokens, labels = data.blocks.train.tokens.flatten(), data.blocks.train.labels.flatten()
    starts = (labels == -100).nonzero().squeeze(1).tolist()
    assert 20 < len(starts) <= 40  # two of each prompt; some may be in the rest that fills no sequence
    for start in starts[:-1]:
        beginning = plain.tokenizer.decode(tokens[start : start + 6])
        assert any(paragraph.startswith(beginning) for paragraph in paragraphs), beginning
    kept = labels != -100
    assert torch.equal(tokens[kept], labels[kept])
    assert {len(tokens[a:b]) for a, b in pairwise(starts)} <= set(range(7, 17))
    assert torch.equal(data.blocks.test.tokens, plain.blocks.test.tokens)  # what people have written


def test_is_written_once_and_anew_for_another_teacher(file, monkeypatch):
    first = data_module(file).blocks.train.tokens
    with monkeypatch.context() as context:
        context.setattr(TeacherTextDataModule, "_write", lambda *_: pytest.fail("written again"))
        assert torch.equal(data_module(file).blocks.train.tokens, first)
    for other in (data_module(file, gpt2(1)), data_module(file, top_k=1), data_module(file, prompt=5)):
        assert not torch.equal(other.blocks.train.tokens[: len(first)], first[: len(other.blocks.train)])


def test_beams_are_the_teachers_best(file):
    teacher = gpt2()
    data = data_module(file, teacher, strategy="beam", num=3)
    greedy = data_module(file, teacher, strategy="greedy")

    score = []
    for of_kind in (data, greedy):
        of_kind.prepare_data()
        ids = of_kind.blocks.train.tokens.long()
        with torch.no_grad():
            score.append(-teacher.eval()(input_ids=ids, labels=ids).loss)
    assert score[0] > score[1] - 0.2  # no worse by more than what prompts and cuts add


def test_a_student_learns_it(file, make_trainer):
    data = data_module(file)
    module = KD(gpt2(5), alpha=1.0, task=CausalLM(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))

    def surprise():
        rows = data.blocks.train
        batch = rows.__getitems__(range(len(rows)))
        return module.losses(module.observe(batch))["hard"].item()

    data.prepare_data()
    before = surprise()
    make_trainer(max_epochs=5).fit(module, datamodule=data)
    assert surprise() < before - 0.5


def test_blocks_mark_where_texts_begin():
    blocks = WrittenBlocks([torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 4, 3])], 3)
    assert blocks.tokens.tolist() == [[5, 6, 7], [8, 9, 4]]
    assert blocks.labels.tolist() == [[-100, 6, 7], [-100, -100, 4]]
    assert blocks[1]["index"].item() == 1
    assert len(WrittenBlocks([], 3)) == 0


def test_beginnings_are_of_texts_that_go_on():
    tokens = torch.tensor([5, 6, 7, 0, 8, 0, 9, 4, 0, 1, 2, 3])
    assert beginnings(tokens, end=0, length=2).tolist() == [[5, 6], [1, 2]]
    assert beginnings(tokens, end=0, length=30).shape == (0, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 16}, "`prompt` must be at least 1 and below `length`, which is 16; got 16"),
        ({"prompt": 0}, "`prompt` must be at least 1"),
        ({"texts": 0}, "`texts` must be at least 1, got 0"),
        ({"files": []}, "`files` is empty"),
    ],
)
def test_refuses_bad_arguments(file, arguments, message):
    with pytest.raises(ValueError, match=message):
        data_module(file, **arguments)


def test_refuses_texts_that_are_too_short(file):
    with pytest.raises(ValueError, match="No training paragraph has more than `prompt` = 31 tokens"):
        data_module(file, prompt=31, length=32).prepare_data()
    silent = gpt2()
    silent.lm_head.weight = torch.nn.Parameter(torch.zeros(300, 8))  # all tokens alike: the first, the end, is taken
    with pytest.raises(ValueError, match="does not fill a sequence of 32 tokens"):
        data_module(file, texts=1, num=1, prompt=6, strategy="greedy", length=32, teacher=silent).prepare_data()
