"""SORSA as a member of PEFT's closed enum and of its registries."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from sorsa_plugin import SORSAConfig, SORSAModel
from sorsa_plugin.compat.peft import add_peft_type
from sorsa_plugin.tools import doctor
from sorsa_plugin.tuner import registration
from sorsa_plugin.tuner.registration import register


def test_registering_again_changes_nothing():
    def state():
        tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
        return [dict(table) for table in tables], list(PeftType), PeftType.SORSA

    before = state()
    for _ in range(2):
        add_peft_type("SORSA")
        register()
    assert state() == before
    assert PeftType.SORSA is before[2]


def test_peft_finds_config_model_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SORSA] is SORSAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SORSA] is SORSAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SORSA] == "sorsa_"
    assert isinstance(peft.get_peft_config({"peft_type": "SORSA", "r": 3}), SORSAConfig)


def test_the_member_behaves_like_the_ones_peft_wrote_itself():
    member = PeftType.SORSA
    assert PeftType("SORSA") is member
    assert PeftType["SORSA"] is member
    assert member == "SORSA"
    assert hash(member) == hash("SORSA")
    assert member.name == member.value == "SORSA"
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "SORSA")
    assert str(member) == str(PeftType.LORA).replace("LORA", "SORSA")
    assert member != PeftType.LORA


def test_the_member_is_listed_once_and_last():
    assert [m for m in PeftType if m == "SORSA"] == [PeftType.SORSA]
    assert list(PeftType)[-1] is PeftType.SORSA
    assert list(PeftType.__members__)[-1] == "SORSA"
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert PeftType.SORSA in PeftType


def test_an_unknown_method_is_still_unknown():
    with pytest.raises(ValueError, match="SORSAX"):
        PeftType("SORSAX")
    with pytest.raises(KeyError):
        PeftType["sorsa"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_member_is_a_singleton_through_pickle_and_copy(protocol):
    assert pickle.loads(pickle.dumps(PeftType.SORSA, protocol)) is PeftType.SORSA
    assert copy.deepcopy(PeftType.SORSA) is PeftType.SORSA
    assert copy.copy(PeftType.SORSA) is PeftType.SORSA


def test_a_fresh_process_that_imported_peft_first_finds_the_pickled_member_once(tmp_path):
    path = tmp_path / "member.pickle"
    path.write_bytes(pickle.dumps({"type": PeftType.SORSA}))
    script = (
        "import sys, pickle, importlib, peft, sorsa_plugin; importlib.reload(sorsa_plugin);"
        "member = pickle.load(open(sys.argv[1], 'rb'))['type'];"
        "print(member is peft.PeftType.SORSA, peft.PeftType('SORSA') is member, list(peft.PeftType).count('SORSA'))"
    )
    process = subprocess.run([sys.executable, "-c", script, path], check=True, capture_output=True, text=True)
    assert process.stdout.strip() == "True True 1"


def test_a_peft_that_ships_its_own_sorsa_is_left_alone(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SORSA, "upstream's")
    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SORSA] == "upstream's"
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SORSA] is SORSAModel


def test_a_transformers_that_refuses_this_peft_is_named_with_what_to_do(monkeypatch, caplog):
    assert registration.version_conflict() is None
    monkeypatch.setattr(registration, "MIN_PEFT_VERSION", "99.0")
    register()
    assert "takes PEFT 99.0 or newer" in caplog.text
    assert "pip install 'transformers<5.24'" in caplog.text
    monkeypatch.setattr(doctor, "version_conflict", registration.version_conflict)
    assert not doctor.examine().healthy
    assert "takes PEFT 99.0" in doctor.examine().conflict
