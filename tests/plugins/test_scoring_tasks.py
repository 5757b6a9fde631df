"""Multiple choice, minimal pairs, exact match and diversity, against computations one text at a time."""

import json

import pytest
import torch

from lightning_peft import ExactMatch, MinimalPairs, MultipleChoice, Perplexity, TokenDiversity
from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.generating import continuations
from lightning_peft.evaluation.log_likelihood import encode_pair, score


@pytest.fixture(scope="session")
def tokenizer(llama_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama_dir)


def likelihood(model, tokenizer, context, continuation):
    """Sum the log-probabilities of a continuation, one forward for one text."""
    before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
    ids = torch.tensor([before + tokenizer(continuation)["input_ids"]])
    with torch.no_grad():
        found = model.eval()(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(found[i - 1, ids[0, i]].item() for i in range(len(before), ids.shape[1]))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QUESTIONS = [
    {"question": "what is red", "choices": ["a rose", "grass and all other plants", "sky"], "label": 0},
    {"question": "who sat", "choices": ["the dog who ran", "cat"], "label": "cat"},
    {"question": "one and one", "choices": ["2", "3", "11"], "label": 0},
]


def test_choices_are_compared_by_likelihood_and_by_that_a_character(llama, llama_dir, tokenizer, tmp_path):
    path = write(tmp_path / "q.jsonl", QUESTIONS)
    found = MultipleChoice(path=path, tokenizer=llama_dir, batch_size=3).evaluate(llama)
    plain = normed = total = 0
    for row in QUESTIONS:
        context = f"Question: {row['question']}\nAnswer:"
        scores = [likelihood(llama, tokenizer, context, f" {choice}") for choice in row["choices"]]
        right = row["label"] if isinstance(row["label"], int) else row["choices"].index(row["label"])
        plain += max(scores) == scores[right]
        by_length = [one / len(choice) for one, choice in zip(scores, row["choices"], strict=True)]
        normed += max(by_length) == by_length[right]
        total += scores[right]
    assert found["acc"] == plain / 3
    assert found["acc_norm"] == normed / 3
    assert found["log_likelihood"] == pytest.approx(total / 3, abs=1e-4)
    assert plain != normed
    assert MultipleChoice(path=path, tokenizer=llama_dir).compared_by() == ("acc_norm", True)
    assert MultipleChoice(path=path, tokenizer=llama_dir, max_examples=1).evaluate(llama)["examples"] == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "choices": ["a"], "label": 0}, r"line 1: 'choices' must be a list of two texts or more"),
        ({"question": "x", "choices": ["a", "b"], "label": 2}, r"'label' must be one of the 2 choices or its number"),
        ({"question": "x", "choice": ["a", "b"], "label": 0}, r"line 1 has no field 'choices'; did you mean 'choice'"),
    ],
)
def test_questions_that_make_no_sense_are_refused(row, message, llama, llama_dir, tmp_path):
    with pytest.raises(ConfigError, match=message):
        MultipleChoice(path=write(tmp_path / "q.jsonl", [row]), tokenizer=llama_dir).evaluate(llama)


def test_pairs_are_compared_whole_and_by_group(llama, llama_dir, tokenizer, tmp_path):
    rows = [
        {"good": "a cat sat", "bad": "a cats sat", "uid": "number"},
        {"good": "the dogs ran", "bad": "the dogs rans", "uid": "number"},
        {"good": "who ran", "bad": "ran who ran", "uid": "order"},
        {"good": "red house", "bad": "h", "uid": "order"},
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    found = MinimalPairs(path=path, tokenizer=llama_dir, batch_size=3).evaluate(llama)
    margins = [likelihood(llama, tokenizer, "", r["good"]) - likelihood(llama, tokenizer, "", r["bad"]) for r in rows]
    assert found["acc"] == sum(margin > 0 for margin in margins) / 4
    assert found["acc/number"] == sum(margin > 0 for margin in margins[:2]) / 2
    assert found["margin"] == pytest.approx(sum(margins) / 4, abs=1e-4)
    assert 0 < found["acc"] < 1
    few = MinimalPairs(path=path, tokenizer=llama_dir, examples_per_group=1).evaluate(llama)
    assert few["examples"] == 2.0
    assert few["acc/order"] == float(margins[2] > 0)


def test_a_real_model_knows_some_grammar(data_dir):
    from lightning_peft import CausalLMLoader

    folder = str(data_dir / "models" / "stories260k")
    task = MinimalPairs(path=str(data_dir / "mc" / "blimp_dev.jsonl"), tokenizer=folder, examples_per_group=4)
    found = task.evaluate(CausalLMLoader(path=folder).load())
    assert found["examples"] == 34 * 4
    assert 0.5 < found["acc"] < 0.9


def test_a_space_at_the_end_of_a_context_goes_to_what_follows(tokenizer):
    assert encode_pair(tokenizer, "a b ", "c") == encode_pair(tokenizer, "a b", " c")
    assert encode_pair(tokenizer, "", "ab")[0] == [tokenizer.bos_token_id]
    with pytest.raises(ConfigError, match="'' adds no token to its context 'a'"):
        encode_pair(tokenizer, "a", "")


def test_what_is_too_long_loses_its_beginning(llama, tokenizer):
    long, short = [4] * 100, [5] * 63
    pairs = [([*long, *short], [7]), (short, [7])]
    assert (
        score(llama, pairs, batch_size=1, max_length=63)[0] == score(llama, pairs[1:], batch_size=1, max_length=63)[0]
    )
    with pytest.raises(ConfigError, match="a continuation of 100 tokens is longer than the 63 of the model"):
        score(llama, [([1], long)], batch_size=1, max_length=63)


class Answers(torch.nn.Module):
    """Writes the same text after every prompt."""

    def __init__(self, text, tokenizer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ids = tokenizer(text)["input_ids"]

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        return torch.cat([input_ids, torch.tensor([self.ids[:max_new_tokens]] * len(input_ids))], dim=1)


def test_the_first_number_that_is_written_is_compared(data_dir, tmp_path):
    from transformers import AutoTokenizer

    folder = str(data_dir / "models" / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"Body": "x", "Question": "y", "Answer": answer} for answer in (12.0, "12", 120)]
    task = ExactMatch(path=write(tmp_path / "m.jsonl", rows), tokenizer=folder)
    found = task.evaluate(Answers("that is 12, not 120.\n120", tokenizer))
    assert found == {"exact_match": 2 / 3, "answered": 1.0, "examples": 3.0}
    assert task.evaluate(Answers("nobody knows\n12", tokenizer))["answered"] == 0.0
    words = ExactMatch(path=task.path, tokenizer=folder, extract="is (.*)", compare="text", answer="Question")
    assert words.evaluate(Answers("it is y\nit is x", tokenizer))["exact_match"] == 1.0


def test_text_is_generated_as_one_prompt_at_a_time(llama, tokenizer):
    prompts = ["the cat", "a", "red house and"]
    found = continuations(llama.eval(), tokenizer, prompts, max_new_tokens=8, batch_size=2)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = llama.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2)
        assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    stop = found[0][2]
    cut = continuations(llama, tokenizer, prompts[:1], max_new_tokens=8, stop=[stop])
    assert cut[0] == found[0].split(stop)[0]
    with pytest.raises(ConfigError, match="max_new_tokens=64 leaves no room for a prompt"):
        continuations(llama, tokenizer, prompts, max_new_tokens=64)
    with pytest.raises(ConfigError, match="which Linear does not have"):
        continuations(torch.nn.Linear(1, 1), tokenizer, prompts, max_new_tokens=1)


def test_diversity_counts_different_texts_and_n_grams(llama, llama_dir, tokenizer):
    same = TokenDiversity(tokenizer=llama_dir, prompts=["a", "b"], samples=4, max_new_tokens=6)
    found = same.evaluate(Answers("c d c d", tokenizer))
    assert found["unique"] == 1 / 4
    assert found["unique_texts"] == 1.0
    assert found["distinct_1"] == 3 / 20  # "c d c" four times: c, d and what stands between them
    assert found["distinct_2"] == 4 / 16
    sampled = TokenDiversity(tokenizer=llama_dir, prompts=["a"], samples=6, max_new_tokens=6)
    state = torch.get_rng_state()
    first = sampled.evaluate(llama)
    assert first["unique"] == 1.0
    assert sampled.evaluate(llama) == first
    assert torch.equal(torch.get_rng_state(), state)
    cold = TokenDiversity(tokenizer=llama_dir, prompts=["a"], samples=6, max_new_tokens=6, temperature=1e-3)
    assert cold.evaluate(llama)["unique_texts"] == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultipleChoice(path="x", tokenizer="x", metric="f1"), "metric must be acc or acc_norm, got 'f1'"),
        (lambda: MultipleChoice(path="x", tokenizer="x", batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: MinimalPairs(path="x", tokenizer="x", max_examples=0), "max_examples must be at least 1, got 0"),
        (lambda: MinimalPairs(path="x", tokenizer="x", group=None, examples_per_group=2), "needs a group, got None"),
        (lambda: ExactMatch(path="x", tokenizer="x", extract="("), r"extract='\(' is no regular expression"),
        (lambda: ExactMatch(path="x", tokenizer="x", compare="set"), "compare must be number or text, got 'set'"),
        (lambda: TokenDiversity(tokenizer="x"), "needs either prompts or a path"),
        (lambda: TokenDiversity(tokenizer="x", prompts=["a"], samples=1), "samples must be at least 2, got 1"),
        (lambda: TokenDiversity(tokenizer="x", prompts=["a"], temperature=0), "temperature must be positive, got 0"),
        (lambda: TokenDiversity(tokenizer="x", prompts=["a"], top_p=2), r"top_p must lie in \(0, 1\], got 2"),
    ],
)
def test_settings_out_of_their_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# -- odd tokenizers and short models -----------------------------------------------------------------------------------


def test_a_token_of_end_that_a_tokenizer_adds_is_not_scored(llama, llama_dir, tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    ending = AutoTokenizer.from_pretrained(llama_dir)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert ending.encode("ab")[-1] == 2
    assert encode_pair(ending, "what is red", " a rose") == encode_pair(tokenizer, "what is red", " a rose")
    assert encode_pair(ending, "", "rose") == encode_pair(tokenizer, "", "rose")
    prompts = ["a b", "the"]
    found = [continuations(llama, one, prompts, max_new_tokens=4) for one in (ending, tokenizer)]
    assert found[0] == found[1]


def test_a_context_of_which_a_tokenizer_knows_nothing_is_an_empty_one(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate("abcdz")}, merges=[]))
    known = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="z")
    assert encode_pair(known, "?!", "ab") == ([4], [0, 1])


def test_a_group_of_an_answer_that_did_not_take_part_is_no_answer():
    task = ExactMatch(path="x.jsonl", tokenizer="x", compare="text", extract=r"is (\w+)?")
    assert task.found_in("it is ") is None
    assert task.found_in("it is red") == "red"


def test_a_text_with_more_tokens_than_a_model_has_positions_is_refused(llama_dir, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    short = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 4)
    with pytest.raises(ConfigError, match="cannot read 24 tokens.*it has 16 positions"):
        Perplexity(path=str(tmp_path / "text.txt"), tokenizer=llama_dir, block_size=24).evaluate(short)
