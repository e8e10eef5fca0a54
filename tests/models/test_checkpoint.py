"""Everything about a model is read from the checkpoint's own files, within limits."""

from __future__ import annotations

import json

import pytest

from qingyu.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from qingyu.models.export.checkpoint import read_checkpoint
from qingyu.models.export.modules import POOLING_FLAGS, POOLING_NAMES


def test_the_facts_of_the_real_e5_are_those_of_its_files(shared_models):
    source = read_checkpoint(shared_models / "multilingual-e5-small-zh")
    sizes = source.architecture
    assert (sizes.layers, sizes.hidden_size, sizes.heads, sizes.intermediate_size) == (12, 384, 12, 1536)
    assert (sizes.vocab_size, sizes.max_positions, sizes.activation) == (34_340, 512, "gelu")
    assert (source.pooling, source.normalize, source.max_tokens, source.dim) == ("mean", True, 512, 384)
    assert source.prompts == {"query": "query: ", "passage": "passage: ", "document": "passage: "}
    assert source.default_prompt is None
    assert not source.front_end.lowercase


def test_a_plain_folder_has_mean_pooling_and_no_normalization(make_checkpoint):
    source = read_checkpoint(make_checkpoint())
    assert (source.pooling, source.normalize, source.prompts, source.head) == ("mean", False, {}, ())


def test_a_sentence_transformers_folder_says_its_pooling_prompts_and_limit(
    make_checkpoint, as_sentence_transformers
):
    settings = {"prompts": {"query": "问："}, "default_prompt_name": "query"}
    source = read_checkpoint(as_sentence_transformers(make_checkpoint(), settings=settings))
    assert (source.pooling, source.normalize, source.max_tokens) == ("cls", True, 32)
    assert (source.prompts, source.default_prompt) == ({"query": "问："}, "query")


@pytest.mark.parametrize(("flag", "pooling"), POOLING_FLAGS.items())
def test_pooling_flags_are_read(flag, pooling, make_checkpoint, as_sentence_transformers):
    flags = {**dict.fromkeys(POOLING_FLAGS, False), flag: True}
    assert read_checkpoint(as_sentence_transformers(make_checkpoint(), pooling=flags)).pooling == pooling


@pytest.mark.parametrize(("name", "pooling"), POOLING_NAMES.items())
def test_pooling_names_are_read(name, pooling, make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(
        make_checkpoint(), pooling={"pooling_mode": name, "include_prompt": True}
    )
    assert read_checkpoint(folder).pooling == pooling


@pytest.mark.parametrize("pooling", [{}, dict.fromkeys(POOLING_FLAGS, False), {"pooling_mode": ["mean"]}])
def test_a_pooling_that_names_no_mode_is_mean(pooling, make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(make_checkpoint(), pooling=pooling)
    assert read_checkpoint(folder).pooling == "mean"


def test_a_pooling_of_the_caller_replaces_that_of_the_folder(make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(make_checkpoint(), pooling={"pooling_mode": ["cls", "mean"]})
    assert read_checkpoint(folder, pooling="mean").pooling == "mean"


@pytest.mark.parametrize(
    ("tokenizer", "transformer", "expected"),
    [
        ({}, {"max_seq_length": None}, 40),
        ({"model_max_length": 24}, {"max_seq_length": None}, 24),
        ({"model_max_length": 24}, {"max_seq_length": 30}, 30),
        ({"model_max_length": 1e30}, {"max_seq_length": None}, 40),
        ({"model_max_length": 10**30}, {"max_seq_length": None}, 40),
        ({"model_max_length": 512}, {"max_seq_length": 512}, 40),
        ({}, {"tokenizer_args": {"model_max_length": 12}}, 12),
    ],
)
def test_the_maximum_is_that_of_sentence_transformers(
    tokenizer, transformer, expected, make_checkpoint, as_sentence_transformers
):
    folder = as_sentence_transformers(make_checkpoint(tokenizer_config=tokenizer), transformer=transformer)
    assert read_checkpoint(folder).max_tokens == expected


@pytest.mark.parametrize(
    ("tokenizer", "transformer"),
    [
        ({}, {}),
        ({"model_max_length": 24}, {"max_seq_length": 20}),
        ({"model_max_length": 24}, {"max_seq_length": None}),
        ({"model_max_length": 1000}, {"max_seq_length": None}),
    ],
)
def test_the_maximum_equals_sentence_transformers(
    tokenizer, transformer, sentence_transformers, make_checkpoint, as_sentence_transformers
):
    folder = as_sentence_transformers(make_checkpoint(tokenizer_config=tokenizer), transformer=transformer)
    reference = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert read_checkpoint(folder).max_tokens == reference.max_seq_length


def test_roberta_has_fewer_tokens_than_positions(make_checkpoint):
    folder = make_checkpoint(config={"model_type": "xlm-roberta", "pad_token_id": 1}, prefix="roberta.")
    source = read_checkpoint(folder)
    assert (source.padding_id, source.max_tokens, source.architecture.max_positions) == (1, 38, 40)


def test_licence_and_repository_are_read_where_they_are_stated(make_checkpoint):
    folder = make_checkpoint(config={"_name_or_path": "BAAI/bge-small-zh-v1.5"})
    assert read_checkpoint(folder).source.license is None
    (folder / "README.md").write_text(
        "---\nlanguage: zh\nlicense: mit\n---\n# license: gpl\n", encoding="utf-8"
    )
    source = read_checkpoint(folder).source
    assert (source.repository, source.license) == ("BAAI/bge-small-zh-v1.5", "mit")


@pytest.mark.parametrize(
    "path", ["/data/models/bge", "./bge", "../up/bge", "bge", 7, "a/../b", "~/bge", "a//b"]
)
def test_a_path_is_no_repository(path, make_checkpoint):
    assert read_checkpoint(make_checkpoint(config={"_name_or_path": path})).source.repository is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", -16),
        ("hidden_size", 10**9),
        ("hidden_size", 16.0),
        ("hidden_size", "16"),
        ("hidden_size", None),
        ("hidden_size", True),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", float("nan")),
        ("vocab_size", float("inf")),
        ("max_position_embeddings", [512]),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", -1e-12),
        ("layer_norm_eps", "1e-12"),
        ("model_type", 5),
        ("hidden_act", {"a": 1}),
    ],
)
def test_an_absurd_number_is_one_error_naming_the_field(field, value, make_checkpoint):
    folder = make_checkpoint(config={field: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: field '{field}': expected a"):
        read_checkpoint(folder)


def test_heads_that_do_not_divide_the_width_are_refused(make_checkpoint):
    folder = make_checkpoint(config={"num_attention_heads": 5})
    with pytest.raises(
        CheckpointError, match="expected hidden_size divisible by num_attention_heads, found 16 and 5"
    ):
        read_checkpoint(folder)


def test_a_padding_id_that_leaves_no_positions_is_refused(make_checkpoint):
    folder = make_checkpoint(config={"model_type": "roberta", "pad_token_id": 39}, prefix="roberta.")
    with pytest.raises(
        CheckpointError, match="field 'pad_token_id': expected a whole number from 0 to 36, found 39"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "electra"},
            "model_type is not supported: expected one of bert, roberta, xlm-roberta, found 'electra'",
        ),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is not supported: expected 'absolute'",
        ),
        ({"hidden_act": "mish"}, "hidden_act is not supported: expected one of identity, gelu"),
        ({"is_decoder": True}, "is_decoder is not supported: expected False, found True"),
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map is not supported"),
    ],
)
def test_another_kind_of_model_is_refused_with_the_way_out(config, message, make_checkpoint):
    with pytest.raises(UnsupportedModelError) as caught:
        read_checkpoint(make_checkpoint(config=config))
    assert message in str(caught.value)
    assert "qingyu export --via optimum" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"3", b"[" * 100_000])
def test_a_config_that_is_no_object_is_one_error(content, make_checkpoint):
    folder = make_checkpoint()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: expected"):
        read_checkpoint(folder)


def test_a_missing_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, found in {"none": "nothing there", "file": "a file", "empty": "an empty folder"}.items():
        with pytest.raises(ModelNotFoundError, match=f"found {found}"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "modules",
    [
        ("Transformer", "Pooling", "LayerNorm"),
        ("Transformer", "WeightedLayerPooling", "Pooling"),
        ("Transformer",),
        ("Transformer", "Pooling", "Normalize", "Dense"),
        ("StaticEmbedding", "Normalize"),
    ],
)
def test_modules_in_another_order_or_of_another_kind_are_refused(
    modules, make_checkpoint, as_sentence_transformers
):
    folder = as_sentence_transformers(make_checkpoint(), modules=modules)
    with pytest.raises(UnsupportedModelError, match=f"found {', '.join(modules)}"):
        read_checkpoint(folder)


def test_dropout_is_passed_over(make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(
        make_checkpoint(), modules=("Transformer", "Pooling", "Dropout", "Normalize")
    )
    assert read_checkpoint(folder).normalize


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "found 2 side by side: cls, max"),
        ({"pooling_mode": ["mean", "max"]}, "found 2 side by side: mean, max"),
        ({"pooling_mode": "mean", "include_prompt": False}, "found include_prompt false"),
    ],
)
def test_a_pooling_that_is_not_one_is_refused(pooling, message, make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(make_checkpoint(), pooling=pooling)
    with pytest.raises(UnsupportedModelError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode": "median"}, {"pooling_mode": 3}, {"pooling_mode_cls_token": "yes"}]
)
def test_a_pooling_that_makes_no_sense_is_one_error(pooling, make_checkpoint, as_sentence_transformers):
    with pytest.raises(CheckpointError, match="field 'pooling_mode"):
        read_checkpoint(as_sentence_transformers(make_checkpoint(), pooling=pooling))


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": {"query": 3}},
        {"prompts": ["a"]},
        {"default_prompt_name": "x"},
    ],
)
def test_prompts_that_make_no_sense_are_one_error(settings, make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(make_checkpoint())
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"field '(prompts|default_prompt_name)'"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "config_sentence_transformers.json"]
)
def test_an_escaped_lone_surrogate_is_no_text(file, make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(make_checkpoint())
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**fields, "cls_token": "\ud800"}))
    with pytest.raises(
        CheckpointError, match=rf"{file} cannot be read: expected JSON in UTF-8, found .*surrogates"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "entry", [{"type": "evil.Module", "path": ""}, {"type": "custom_st.Transformer", "path": ""}]
)
def test_a_module_of_the_checkpoints_own_code_is_refused(entry, make_checkpoint):
    folder = make_checkpoint()
    (folder / "modules.json").write_text(json.dumps([entry]))
    with pytest.raises(UnsupportedModelError, match="expected modules of sentence-transformers"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", ["{}", "[]", "[3]", "null", '[{"type": 3}]'])
def test_a_modules_file_that_makes_no_sense_is_one_error(content, make_checkpoint):
    folder = make_checkpoint()
    (folder / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        read_checkpoint(folder)


def test_a_module_cannot_lie_outside_the_folder(make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(make_checkpoint())
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["path"] = "../1_Pooling"
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        read_checkpoint(folder)


def test_a_task_head_behind_sentence_transformers_is_refused(make_checkpoint, as_sentence_transformers):
    folder = as_sentence_transformers(make_checkpoint(), transformer={"transformer_task": "fill-mask"})
    with pytest.raises(UnsupportedModelError, match="found fill-mask giving token_embeddings"):
        read_checkpoint(folder)
