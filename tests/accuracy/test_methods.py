"""Methods as they are written on the command line."""

import pytest
from accuracy.methods import METHODS, parse_method


@pytest.mark.parametrize("name", METHODS)
def test_every_name_is_a_method(name):
    assert parse_method(name, 5).name == name


def test_budget_counts_sinks_and_recent_tokens():
    method = parse_method("tailorkv:budget=1024,index=onebit", 5)
    assert method.config is not None
    assert method.config.budget_tokens == 1024 and method.config.index == "onebit"
    assert parse_method("quest:budget=192", 5).config.budget_tokens == 192


def test_full_attention_is_no_engine_of_ours():
    assert parse_method("full", 5).engine_options is None


def test_what_changes_pages_needs_another_engine():
    plain = parse_method("tailorkv", 5).engine_options
    assert parse_method("tailorkv:budget=512,query_reduce=mean", 5).engine_options == plain
    assert parse_method("oracle", 5).engine_options == plain
    assert parse_method("tailorkv:bits=4", 5).engine_options != plain
    assert parse_method("all_quantized", 5).engine_options != plain


def test_all_quantized_is_every_layer():
    method = parse_method("all_quantized", 3)
    assert method.config.profile.dense_layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qest", "unknown method 'qest'"),
        ("tailorkv:bits", "not option=value"),
        ("tailorkv:bits=3", "bits"),
        ("tailorkv:budget=10", "topk_tokens"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text, 5)
