"""`QuantDescriptor` and `QuantRule`: plain immutable data."""

import dataclasses
import math
import pickle
import re

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lq.descriptor import INT8_INPUT, INT8_WEIGHT, PRESETS, QuantDescriptor, QuantRule, resolve_rules

POSITIVE = st.floats(min_value=0, allow_infinity=False)
ROW = st.lists(POSITIVE, min_size=1, max_size=3)
FIELDS = {
    "name": st.none() | st.text(),
    "axis": st.none() | st.integers(0, 4) | st.lists(st.integers(-4, -2), max_size=3, unique=True),
    "amax": st.none()
    | POSITIVE
    | st.lists(POSITIVE, min_size=1, max_size=3)
    | st.lists(st.lists(POSITIVE, min_size=1), min_size=1),
    "learn_amax": st.booleans(),
    "scale_amax": st.none() | POSITIVE,
    "narrow_range": st.booleans(),
    "calib_method": st.sampled_from(["max", "histogram"]),
    "num_bins": st.integers(2, 10**6),
    "block_size": st.none() | st.integers(1, 256),
}
DESCRIPTORS = st.builds(
    QuantDescriptor, st.integers(2, 32), unsigned=st.booleans(), fake_quant=st.booleans(), **FIELDS
) | st.builds(QuantDescriptor, st.sampled_from([(4, 3), (5, 2)]), **FIELDS)


# There and back


@settings(max_examples=200, deadline=None)
@given(DESCRIPTORS)
def test_yaml_dict_and_pickle_give_it_back(desc):
    for again in (
        QuantDescriptor.from_yaml(desc.to_yaml()),
        QuantDescriptor.from_dict(desc.dict()),
        QuantDescriptor(**desc.dict()),
        pickle.loads(pickle.dumps(desc)),
    ):
        assert again == desc
        assert hash(again) == hash(desc)
        assert repr(again) == repr(desc)


@settings(max_examples=50, deadline=None)
@given(DESCRIPTORS)
def test_its_dict_is_plain_yaml(desc):
    assert yaml.safe_load(desc.to_yaml()) == desc.dict()


def test_its_dict_has_only_what_differs_from_the_defaults():
    assert QuantDescriptor().dict() == {}
    assert QuantDescriptor.from_yaml(QuantDescriptor().to_yaml()) == QuantDescriptor.from_yaml("") == QuantDescriptor()
    desc = QuantDescriptor(num_bits=4, axis=(0, 1), amax=np.array([1.5, 2.0]), narrow_range=False)
    assert desc.dict() == {"num_bits": 4, "axis": [0, 1], "amax": [1.5, 2.0], "narrow_range": False}


# Identity


@pytest.mark.parametrize("array", [np.array([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]), [[1.0], [2.0]], ((1.0,), (2.0,))])
def test_arrays_compare_and_hash_by_value(array):
    desc = QuantDescriptor(amax=array)
    assert desc == QuantDescriptor(amax=((1.0,), (2.0,)))
    assert len({desc, QuantDescriptor(amax=((1.0,), (2.0,)))}) == 1
    assert desc != QuantDescriptor(amax=((1.0,), (2.5,)))


def test_arrays_are_copied():
    array = np.array([1.0, 2.0])
    desc = QuantDescriptor(amax=array)
    array[0] = 9
    assert desc.amax == (1.0, 2.0)


@pytest.mark.parametrize("axis", [np.int64(1), torch.tensor(1), 1])
def test_an_axis_from_numpy_is_an_int(axis):
    assert type(QuantDescriptor(axis=axis).axis) is int


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantDescriptor().num_bits = 4


def test_replace_changes_a_copy():
    desc = QuantDescriptor(axis=0)
    assert desc.replace(num_bits=4) == QuantDescriptor(num_bits=4, axis=0)
    assert desc == QuantDescriptor(axis=0)
    with pytest.raises(ValueError, match="`num_bits`"):
        desc.replace(num_bits=1)


# Refusals


@pytest.mark.parametrize("num_bits", [-8, 0, 1, 33, (3, 4), (4, 3, 1)])
def test_num_bits_out_of_range(num_bits):
    with pytest.raises(ValueError, match=re.escape(f"`num_bits` is {num_bits}: choose 2 to 32 for an integer, (4, 3) or (5, 2)")):
        QuantDescriptor(num_bits=num_bits)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(("num_bins", 1), ("num_bins", 0), ("calib_method", "entropy"), ("calib_method", None), ("block_size", 0)),
        *(("amax", -1.0), ("amax", math.nan), ("amax", (1.0, math.inf)), ("scale_amax", -2.0), ("scale_amax", math.nan)),
    ],
)
def test_a_value_out_of_range_is_named(field, bad):
    with pytest.raises(ValueError, match=re.escape(f"`{field}` is {bad!r}")):
        QuantDescriptor(**{field: bad})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": (4, 3), "unsigned": True}, "float formats have a sign"),
        ({"num_bits": (4, 3), "fake_quant": False}, "no integer codes"),
        ({"axis": (0, -1), "block_size": 8}, "blocks lie along that dimension"),
        ({"axis": (1, 1)}, "`axis` names a dimension twice"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantDescriptor(**fields)


FIELDS_WITH_A_TYPE = [
    *("num_bits", "num_bins", "block_size", "unsigned", "narrow_range", "fake_quant", "learn_amax", "axis"),
]


@pytest.mark.parametrize("field", FIELDS_WITH_A_TYPE)
@pytest.mark.parametrize("bad", ["8", 8.5, {}])
def test_a_value_of_another_type_is_named(field, bad):
    # a text is the name of a way to learn, but there is none of that name
    expected = ValueError if (field, bad) == ("learn_amax", "8") else TypeError
    with pytest.raises(expected, match=f"`{field}` is {bad!r}"):
        QuantDescriptor(**{field: bad})


@pytest.mark.parametrize(
    ("field", "bad"),
    [("num_bits", True), ("num_bins", False), ("block_size", True), ("unsigned", 1), ("narrow_range", None), ("axis", True)],
)
def test_numbers_are_no_booleans_and_booleans_no_numbers(field, bad):
    with pytest.raises(TypeError, match=f"`{field}` is {bad!r}"):
        QuantDescriptor(**{field: bad})


@pytest.mark.parametrize("parse", [QuantDescriptor.from_dict, lambda d: QuantDescriptor.from_yaml(yaml.safe_dump(d))])
def test_unknown_keys_are_named_with_the_known_ones(parse):
    with pytest.raises(ValueError, match=r"'bits', 'scale'.*num_bits, name, fake_quant, axis"):
        parse({"scale": 1, "num_bits": 8, "bits": 4})


# Rules and presets


@pytest.mark.parametrize("side", ["input", "weight"])
@pytest.mark.parametrize("bad", ["int8", 8, [8]])
def test_a_rule_takes_descriptors_only(side, bad):
    with pytest.raises(TypeError, match=rf"`{side}` of rule 'layer\*'"):
        QuantRule("layer*", **{side: bad})


@pytest.mark.parametrize("bad", [8, ["Linear", 3], {"Linear": 1}])
def test_a_rule_names_types_by_text(bad):
    with pytest.raises(TypeError, match=r"`types` of rule 'layer\*'"):
        QuantRule("layer*", types=bad)


def test_types_may_be_one_name_or_a_list_as_yaml_has_them():
    assert QuantRule("*", types="Linear") == QuantRule("*", types=["Linear"]) == QuantRule("*", types=("Linear",))


def test_a_rule_without_descriptors_is_a_rule():
    assert QuantRule("head") == QuantRule("head", None, None)


@pytest.mark.parametrize(
    ("preset", "input", "weight"),
    [
        ("int8", QuantDescriptor(narrow_range=False), QuantDescriptor(axis=0)),
        ("int8_per_tensor", QuantDescriptor(narrow_range=False), QuantDescriptor()),
        ("int8_weight_only", None, QuantDescriptor(axis=0)),
        ("w4a8", QuantDescriptor(narrow_range=False), QuantDescriptor(num_bits=4, axis=0)),
    ],
)
def test_presets_are_what_runtimes_execute(preset, input, weight):
    assert resolve_rules(preset) == [QuantRule("*", input, weight)]


def test_fp8_has_one_scale_per_tensor_and_w4a16_blocks_of_linear_layers():
    fp8 = QuantDescriptor(num_bits=(4, 3))
    assert resolve_rules("fp8") == [QuantRule("*", fp8, fp8)]
    blocks = QuantDescriptor(num_bits=4, axis=0, block_size=128)
    assert resolve_rules("w4a16") == [QuantRule("*", None, blocks, types=("Linear",))]


def test_every_preset_is_tested():
    low = {"w4a4", "w3a3", "w2a2"}
    assert set(PRESETS) == {"int8", "int8_attention", "int8_per_tensor", "int8_weight_only", "w4a8", "w4a16", "fp8"} | low
    assert (INT8_INPUT.narrow_range, INT8_WEIGHT.narrow_range) == (False, True)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_low_bits_are_learned_with_every_code(bits):
    desc = QuantDescriptor(bits, learn_amax="lsq", narrow_range=False)
    assert resolve_rules(f"w{bits}a{bits}") == [QuantRule("*", desc, desc.replace(axis=0))]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("w4a16", "int8_attention")])
def test_presets_and_configs_of_one_name_are_one(name):
    with initialize_config_module("lq.conf", version_base="1.3"):
        quant = compose("run", [f"quant={name}"]).quant
    assert resolve_rules(OmegaConf.to_container(quant, resolve=True)["rules"]) == PRESETS[name]


def test_one_rule_needs_no_list():
    assert resolve_rules(QuantRule("a")) == [QuantRule("a")]


def test_rules_may_be_mappings_as_yaml_gives_them():
    given = [{"pattern": "a", "input": {"num_bits": 4}}, QuantRule("b", weight={"axis": 0}), {"pattern": "c", "weight": None}]
    assert resolve_rules(given) == [
        QuantRule("a", QuantDescriptor(num_bits=4)),
        QuantRule("b", None, QuantDescriptor(axis=0)),
        QuantRule("c"),
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pattern": "a", "output": None}, "Unknown rule key 'output': choose among pattern, input, weight"),
        ({"pattern": "a", "input": {"bits": 8}}, "Unknown descriptor key 'bits'"),
        ({"pattern": "a", "input": {"num_bits": 99}}, "`num_bits` is 99"),
    ],
)
def test_mistakes_in_a_mapping_are_named(rule, message):
    with pytest.raises(ValueError, match=message):
        resolve_rules([rule])


def test_rules_that_are_given_are_used():
    rules = (QuantRule("a"), QuantRule("b", INT8_INPUT))
    assert resolve_rules(rules) == list(rules)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'int3'.*int8, int8_attention, int8_per_tensor"):
        resolve_rules("int3")


@pytest.mark.parametrize(
    ("text", "message"), [("5", "mapping of its fields, not from 5"), ("foo", "mapping of its fields, not from 'foo'")]
)
def test_yaml_that_is_no_descriptor_is_refused(text, message):
    with pytest.raises(TypeError, match=message):
        QuantDescriptor.from_yaml(text)


def test_amax_is_made_of_numbers():
    with pytest.raises(ValueError, match=r"`amax` is \(\)"):
        QuantDescriptor(amax=[])
    with pytest.raises(TypeError, match="`amax` is True"):
        QuantDescriptor(amax=True)
