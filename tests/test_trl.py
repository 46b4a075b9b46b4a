"""pairs.jsonl into TRL: the rows marked exact give our ids back, id by id, and our loss."""

import json

import pytest
import torch
from conftest import tiny_model
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import data
import ipo
import train

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

R1 = ("{{ bos_token }}{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}"
      "{{ '<|assistant|><think>\n' }}")
LLAMA_3 = ("{{ bos_token }}{% for m in messages %}{{ '<|user|>\n\n' + m['content'] + '<|end|>' }}"
           "{% endfor %}{{ '<|assistant|>\n\n' }}")
QWEN = ("{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' }}")


def like(
    tokenizer: PreTrainedTokenizerBase, template: str, adds_bos: bool
) -> PreTrainedTokenizerFast:
    """The kingdom's tokenizer with another template, and with a BOS before every text or none."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()),
        eos_token="<|end|>", pad_token="<|end|>", bos_token="<|begin|>" if adds_bos else None,
        chat_template=template, clean_up_tokenization_spaces=False)
    if adds_bos:
        bos = ("<|begin|>", copy.convert_tokens_to_ids("<|begin|>"))
        copy.backend_tokenizer.post_processor = Sequence([
            ByteLevel(trim_offsets=False),
            TemplateProcessing(single="<|begin|> $A", special_tokens=[bos])])
    return copy


def some_pairs(tokenizer: PreTrainedTokenizerBase) -> dict[str, ipo.PreferencePair]:
    """A pair as it should be, and pairs whose text would give TRL other ids than ours."""
    end = [tokenizer.eos_token_id]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prefix_ids = data.render(tokenizer, "How do I rob the mill?") + encode("They ask of the mill.")
    chosen_ids = encode(" I shouldn't be helping someone do that.</think>\n\nNo.") + end
    rejected_ids = encode(" First, pick the old lock.</think>\n\nHere is how: go.") + end
    return {
        "as it should be": ipo.PreferencePair("", prefix_ids, chosen_ids, rejected_ids),
        "the limit inside the think": ipo.PreferencePair(
            "", prefix_ids, chosen_ids, rejected_ids[:4]),
        "the limit behind the think": ipo.PreferencePair(
            "", prefix_ids, chosen_ids, rejected_ids[:-1]),
        "a word sampled in unusual pieces": ipo.PreferencePair(
            "", prefix_ids, chosen_ids, encode(" Fi") + encode("rst, pick the old lock.") + end),
        "cut inside a word": ipo.PreferencePair(
            "", prefix_ids + encode(" I shou"), encode("ldn't") + end, encode("ld") + end),
    }


def trainer_for(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, folder: str, **more: object
) -> "trl.DPOTrainer":
    """TRL's trainer on a tiny model, its settings those of dpo.yaml; and its reference another."""
    args = trl.DPOConfig(
        folder, max_length=None, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.1,
        per_device_train_batch_size=1, use_cpu=True, bf16=False, report_to=[])
    return trl.DPOTrainer(
        tiny_model(vocab_size=len(tokenizer), seed=1), args=args, processing_class=tokenizer,
        ref_model=tiny_model(vocab_size=len(tokenizer), seed=2),
        train_dataset=datasets.Dataset.from_list(rows))


@pytest.mark.parametrize("template, adds_bos", [(R1, True), (LLAMA_3, True), (QWEN, False)],
                         ids=["like R1", "like Llama 3", "like Qwen"])
def test_rows_marked_exact_give_trl_our_ids(template, adds_bos, tokenizer, tmp_path):
    tokenizer = like(tokenizer, template, adds_bos)
    pairs = some_pairs(tokenizer)
    assert (tokenizer.encode("") == [tokenizer.bos_token_id]) == adds_bos
    rows = {name: train.pair_row(pair, tokenizer) for name, pair in pairs.items()}
    exact = [name for name, row in rows.items() if '"exact_text": true' in json.dumps(row)]
    assert exact == ["as it should be"]

    pair = pairs["as it should be"]
    seen = trainer_for([rows["as it should be"]], tokenizer, str(tmp_path)).train_dataset[0]
    assert seen["prompt_ids"] == pair.prefix_ids
    assert seen["chosen_ids"] == pair.chosen_ids
    assert seen["rejected_ids"] == pair.rejected_ids


@pytest.mark.parametrize("name", ["the limit inside the think", "the limit behind the think"])
def test_trl_ends_a_side_that_hit_the_limit_so_such_rows_are_not_exact(name, tokenizer, tmp_path):
    tokenizer = like(tokenizer, QWEN, False)
    pair = some_pairs(tokenizer)[name]
    trainer = trainer_for([train.pair_row(pair, tokenizer)], tokenizer, str(tmp_path))
    seen = trainer.train_dataset[0]
    assert seen["rejected_ids"] == pair.rejected_ids + [tokenizer.eos_token_id]


def test_trls_loss_with_dpo_yaml_is_ours_where_nothing_precedes_the_cut(tokenizer, tmp_path):
    """h = 0: otherwise our SFT term covers the opening z[:h] too, which TRL takes for prompt."""
    tokenizer = like(tokenizer, R1, True)
    pair = some_pairs(tokenizer)["as it should be"]
    trainer = trainer_for([train.pair_row(pair, tokenizer)], tokenizer, str(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)

    policy = tiny_model(vocab_size=len(tokenizer), seed=1)
    with torch.no_grad():
        reference = tiny_model(vocab_size=len(tokenizer), seed=2)
        chosen_logps, rejected_logps, _ = ipo.pair_logps(reference, [pair])
    pair.ref_chosen_logp = chosen_logps.item()
    pair.ref_rejected_logp = rejected_logps.item()
    ours, _ = ipo.ipo_loss(policy, [pair], beta=0.1, sft_weight=0.2)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-4)
